"use strict";
// The page's two parts that move: the table of scores and the browser of single answers. All text
// from models and data enters the page as text nodes. The address's hash holds the state
// (#task=pope&a=0&b=1&filter=wrong&search=dog&page=1&base=0&at=browser), so that a view can be
// linked to, and a test can open one.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const PER_PAGE = 25;
  const RIGHT = 0.5; // a score of at least this is called right
  const MOST_KINDS = 12; // references or readings a confusion table may have
  const UNREAD = "not understood";
  const FILTERS = {
    all: () => true,
    right: (a) => isRight(a) === true,
    wrong: (a) => isRight(a) === false,
    noscore: (a) => isRight(a) === null,
    differ: (a, b) => FILTERS.better(a, b) || FILTERS.worse(a, b),
    better: (a, b) => b !== null && isRight(a) === true && isRight(b) === false,
    worse: (a, b) => b !== null && isRight(a) === false && isRight(b) === true,
    bothright: (a, b) => b !== null && isRight(a) === true && isRight(b) === true,
    bothwrong: (a, b) => b !== null && isRight(a) === false && isRight(b) === false,
    changed: (a, b) => b !== null && text(a) !== text(b),
  };
  const TWO_RUNS = new Set(["differ", "better", "worse", "bothright", "bothwrong", "changed"]);
  const CHOSEN = ["task", "a", "b", "filter", "search"];
  const state = {
    task: data.tasks[0]?.name ?? "", a: 0, b: -1, filter: "all", search: "", page: 1,
    ref: "", read: "", base: -1, sort: "", at: "",
  };

  function isRight(answer) {
    return answer === null || answer.score === null ? null : answer.score >= RIGHT;
  }

  function text(answer) {
    return answer === null ? null : answer.prediction;
  }

  function element(tag, className, content) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (content !== undefined) made.textContent = content;
    return made;
  }

  // The state and the address

  function readHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    const names = data.tasks.map((task) => task.name);
    const run = (value, least) => {
      const number = Number.parseInt(value, 10);
      return number >= least && number < data.runs.length ? number : least;
    };
    state.task = names.includes(given.get("task")) ? given.get("task") : state.task;
    state.a = run(given.get("a") ?? state.a, 0);
    for (const name of ["b", "base"]) state[name] = run(given.get(name) ?? state[name], -1);
    state.filter = Object.hasOwn(FILTERS, given.get("filter")) ? given.get("filter") : state.filter;
    for (const name of ["search", "ref", "read", "sort", "at"]) {
      state[name] = given.get(name) ?? state[name];
    }
    state.page = Math.max(1, Number.parseInt(given.get("page") ?? state.page, 10) || 1);
  }

  function writeHash(at) {
    state.at = at;
    const said = Object.entries(state).filter(([, value]) => value !== "");
    const hash = new URLSearchParams(said.map(([k, v]) => [k, String(v)]));
    history.replaceState(null, "", `#${hash}`);
  }

  // Scores: differences to a chosen run, order, parts

  function showDifferences() {
    const base = state.base;
    if (get("base")) get("base").value = String(base);
    get("base-note").hidden = base < 0;
    for (const row of get("scores-table").querySelectorAll("tbody tr:not(.remarks)")) {
      const cells = [...row.cells].slice(1);
      const from = base < 0 ? undefined : cells[base]?.dataset.value;
      cells.forEach((cell, run) => {
        const shown = cell.querySelector(".difference");
        if (!shown) return;
        const known = from !== undefined && run !== base;
        const paired = known ? JSON.parse(cell.dataset.paired)[base] : undefined;
        shown.textContent = known
          ? signed(cell.dataset.value - from) + (paired ? ` [${paired}]` : "")
          : "";
      });
    }
  }

  function signed(number) {
    const shown = number.toFixed(1);
    return number >= 0 ? `+${shown}` : shown;
  }

  function sortScores() {
    const table = get("scores-table");
    const [column, order] = state.sort.split(".");
    const share = (row) => Number(row?.cells[Number(column) + 1]?.dataset.share ?? -1);
    const compare = (one, other) => (order === "ascending" ? -1 : 1) * (share(other) - share(one));
    const bodies = [...table.tBodies];
    const byPlace = (one, other) => one.dataset.place - other.dataset.place;
    const byName = (one, other) => one.dataset.task.localeCompare(other.dataset.task);
    const named = (one, other) => (order === "descending" ? byName(other, one) : byName(one, other));
    bodies.sort(byPlace);
    if (column === "name") bodies.sort(named);
    else if (column) bodies.sort((one, other) => compare(one.rows[0], other.rows[0]));
    for (const body of bodies) {
      sortParts(body, column && column !== "name" ? compare : null);
      table.append(body);
    }
    for (const button of table.querySelectorAll("button.sort")) {
      const chosen = button.dataset.sort === column;
      button.closest("th").setAttribute("aria-sort", chosen ? order : "none");
    }
  }

  function sortParts(body, compare) {
    // A metric's parts are compared with each other; without an order they stand as they came.
    const rows = [...body.querySelectorAll("tr.part")];
    const metrics = [...new Set(rows.map((row) => row.dataset.metric))];
    rows.forEach((row, place) => { row.dataset.place ??= place; });
    rows.sort((one, other) => compare
      ? metrics.indexOf(one.dataset.metric) - metrics.indexOf(other.dataset.metric) || compare(one, other)
      : one.dataset.place - other.dataset.place);
    const end = body.querySelector("tr.remarks");
    for (const row of rows) body.insertBefore(row, end);
  }

  function expand(body, open) {
    for (const row of body.querySelectorAll("tr.part")) row.hidden = !open;
    body.querySelector("button.expand")?.setAttribute("aria-expanded", String(open));
  }

  function startScores() {
    const table = get("scores-table");
    if (!table) return;
    get("base")?.addEventListener("input", (event) => {
      state.base = Number(event.target.value);
      writeHash("scores");
      showDifferences();
    });
    get("parts").addEventListener("click", (event) => {
      const open = event.target.getAttribute("aria-pressed") !== "true";
      event.target.setAttribute("aria-pressed", String(open));
      for (const body of table.tBodies) expand(body, open);
    });
    table.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button?.classList.contains("expand")) {
        expand(button.closest("tbody"), button.getAttribute("aria-expanded") !== "true");
      } else if (button?.classList.contains("sort")) {
        const first = button.dataset.sort === "name" ? "ascending" : "descending";
        const second = first === "ascending" ? "descending" : "ascending";
        const next = { none: first, [first]: second, [second]: "" };
        const order = next[button.closest("th").getAttribute("aria-sort")];
        state.sort = order ? `${button.dataset.sort}.${order}` : "";
        writeHash("scores");
        sortScores();
      }
    });
  }

  // Answers

  const kind = (value) => value.trim().toLowerCase();
  const referenceOf = (question) => question.reference === null ? "hidden" : kind(question.reference);
  const readOf = (answer) => answer.parsed === null ? UNREAD : kind(answer.parsed);

  function crossed(question, a) {
    return (!state.ref || referenceOf(question) === state.ref) && (!state.read || readOf(a) === state.read);
  }

  function matches(question) {
    const a = question.answers[state.a];
    const b = state.b < 0 ? null : question.answers[state.b];
    if (a === null || (TWO_RUNS.has(state.filter) && b === null)) return false;
    if (!FILTERS[state.filter](a, b) || !crossed(question, a)) return false;
    const wanted = state.search.toLowerCase();
    const searched = [question.question, question.reference, ...question.answers.map(text)];
    return !wanted || searched.some((part) => part && part.toLowerCase().includes(wanted));
  }

  function crossTable(caption, rows, columns, cell) {
    // cell(row, column) -> [label, aria-label, chosen, onclick]
    const table = element("table");
    const head = table.createTHead().insertRow();
    const heading = (content, scope) => {
      const made = element("th", "", content);
      made.scope = scope;
      return made;
    };
    table.append(element("caption", "", caption));
    head.append(element("td"), ...columns.map((column) => heading(column, "col")));
    const body = table.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      line.append(heading(row, "row"));
      for (const column of columns) {
        const [label, spoken, chosen, click] = cell(row, column);
        const button = element("button", "cell", label);
        button.type = "button";
        button.setAttribute("aria-label", spoken);
        button.setAttribute("aria-pressed", String(chosen));
        button.addEventListener("click", () => choose(click));
        line.insertCell().append(button);
      }
    }
    return table;
  }

  function choose(changes) {
    Object.assign(state, changes, { page: 1 });
    writeHash("browser");
    show();
  }

  function confusion(task) {
    const counts = new Map();
    const references = new Set();
    const readings = new Set();
    for (const question of task.questions) {
      const a = question.answers[state.a];
      if (a === null || a.prediction === null) continue;
      const pair = [referenceOf(question), readOf(a)];
      references.add(pair[0]);
      readings.add(pair[1]);
      if (Math.max(references.size, readings.size) > MOST_KINDS) return [];
      const key = JSON.stringify(pair);
      counts.set(key, (counts.get(key) ?? 0) + 1);
    }
    if (references.size < 2) return [];
    const order = (found) => [...found].sort((x, y) => (x === UNREAD) - (y === UNREAD) || x.localeCompare(y));
    return [crossTable("Reference (down) and reading of A's answer (across)", order(references), order(readings),
      (ref, read) => {
        const chosen = state.ref === ref && state.read === read;
        const count = counts.get(JSON.stringify([ref, read])) ?? 0;
        const spoken = `reference ${ref}, read as ${read}: ${count} questions`;
        return [String(count), spoken, chosen, chosen ? { ref: "", read: "" } : { ref, read }];
      })];
  }

  function flips(task) {
    if (state.b < 0) return [];
    const names = { right: { right: "bothright", wrong: "better" }, wrong: { right: "worse", wrong: "bothwrong" } };
    const count = (filter) => task.questions.filter((question) => {
      const [a, b] = [question.answers[state.a], question.answers[state.b]];
      return a !== null && FILTERS[filter](a, b);
    }).length;
    return [crossTable("A (down) and B (across)", ["right", "wrong"], ["right", "wrong"], (a, b) => {
      const filter = names[a][b];
      const chosen = state.filter === filter;
      const found = count(filter);
      return [String(found), `A ${a}, B ${b}: ${found} questions`, chosen, { filter: chosen ? "all" : filter }];
    })];
  }

  function picture(question) {
    const source = data.images[question.image];
    if (!source) return element("div", "blank", question.imageNote);
    const image = element("img");
    image.width = source.width; // its height is reserved before it is there
    image.height = source.height;
    image.alt = `picture of ${question.id}`;
    image.src = source.src;
    const button = element("button", "zoom");
    button.type = "button";
    button.setAttribute("aria-label", `picture of ${question.id}, show it large`);
    button.append(image);
    button.addEventListener("click", () => enlarge(question, source));
    return button;
  }

  function enlarge(question, source) {
    const image = element("img");
    image.alt = `picture of ${question.id}, large`;
    image.src = source.large ?? source.src;
    get("large").querySelector("img")?.remove();
    get("large").append(image);
    get("large-question").textContent = `${question.id}: ${question.question}`;
    get("large").showModal();
  }

  function answerBox(answer, place) {
    const right = isRight(answer);
    const name = right === null ? "none" : right ? "right" : "wrong";
    const box = element("div", `answer ${name}`);
    const words = { none: "no score", right: "right", wrong: "wrong" };
    const side = (place === state.a ? "A: " : "") + (place === state.b ? "B: " : "");
    const shown = answer.prediction === null ? answer.excluded ?? "no answer" : answer.prediction;
    const partly = answer.score !== null && answer.score > 0 && answer.score < 1;
    const mark = words[name] + (partly ? `, score ${answer.score.toFixed(2)}` : "");
    box.append(element("span", "run", side + data.runs[place]), element("span", `mark ${name}`, mark),
      element("span", "text", shown));
    return box;
  }

  function card(question) {
    const made = element("article", "sample");
    made.dataset.id = question.id;
    const body = element("div");
    const answers = element("div", "answers");
    const asked = question.answers.map((answer, place) => answer && answerBox(answer, place));
    answers.append(...asked.filter((box) => box !== null));
    const reference = question.reference === null ? "reference hidden" : `reference: ${question.reference}`;
    body.append(element("h3", "", question.id), element("div", "question", question.question),
      element("div", "reference", reference), answers);
    made.append(picture(question), body);
    return made;
  }

  function show() {
    const task = data.tasks.find((one) => one.name === state.task);
    const found = task ? task.questions.filter(matches) : [];
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    state.page = Math.min(state.page, pages);
    const first = (state.page - 1) * PER_PAGE;
    get("samples").replaceChildren(...found.slice(first, first + PER_PAGE).map(card));
    get("confusion").replaceChildren(...(task ? confusion(task) : []));
    get("flips").replaceChildren(...(task ? flips(task) : []));
    const left = task && task.leftOut ? ` (${task.leftOut} more are not on this page)` : "";
    const asked = task ? task.questions.filter((question) => question.answers[state.a] !== null).length : 0;
    const cell = state.ref || state.read ? `, reference ${state.ref || "any"} read as ${state.read || "any"}` : "";
    get("count").textContent = `${found.length} of ${asked} questions${left}${cell}`;
    get("place").textContent = `page ${state.page} of ${pages}`;
    get("previous").disabled = state.page <= 1;
    get("next").disabled = state.page >= pages;
    for (const name of CHOSEN) get(name).value = String(state[name]);
    for (const option of get("filter").options) {
      option.disabled = TWO_RUNS.has(option.value) && state.b < 0;
    }
    document.body.dataset.shown = String(found.length);
  }

  function fill(select, entries) {
    select.append(
      ...entries.map(([value, name]) => {
        const option = element("option", "", name);
        option.value = value;
        return option;
      }),
    );
  }

  function startAnswers() {
    if (!get("samples")) return;
    fill(get("task"), data.tasks.map((task) => [task.name, task.name]));
    const runs = data.runs.map((name, place) => [String(place), name]);
    fill(get("a"), runs);
    fill(get("b"), [["-1", "none"], ...runs]);
    for (const name of CHOSEN) {
      get(name).addEventListener("input", (event) => {
        const value = event.target.value;
        state[name] = name === "a" || name === "b" ? Number(value) : value;
        if (state.b < 0 && TWO_RUNS.has(state.filter)) state.filter = "all";
        choose(name === "task" || name === "a" ? { ref: "", read: "" } : {});
      });
    }
    get("everything").addEventListener("click", () => choose({ filter: "all", search: "", ref: "", read: "" }));
    for (const [name, step] of [["previous", -1], ["next", 1]]) {
      get(name).addEventListener("click", () => {
        state.page += step;
        writeHash("browser");
        show();
        get("browser").scrollIntoView();
      });
    }
    get("close").addEventListener("click", () => get("large").close());
    get("large").addEventListener("click", (event) => {
      if (event.target === get("large")) get("large").close(); // beside the picture
    });
  }

  function follow() {
    // What the address says; a link to a section alone leaves the state as it is.
    if (location.hash.includes("=")) readHash();
    if (get("scores-table")) {
      showDifferences();
      sortScores();
    }
    if (get("samples")) show();
    if (state.at) get(state.at)?.scrollIntoView();
  }

  function start() {
    startScores();
    startAnswers();
    for (const link of document.querySelectorAll("nav a")) {
      link.addEventListener("click", (event) => {
        event.preventDefault(); // the state stays in the address
        writeHash(link.hash.slice(1));
        get(state.at)?.scrollIntoView();
      });
    }
    window.addEventListener("hashchange", follow);
    follow();
    document.body.dataset.loadedMs = String(Math.round(performance.now())); // for tools/time_report.py
  }

  start();
})();
