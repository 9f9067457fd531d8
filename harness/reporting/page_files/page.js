"use strict";
// The browser of single answers. All text from models and data enters the page as text nodes.
// The address's hash holds the state (#task=pope&a=0&b=1&filter=wrong&search=dog&page=1), so that a
// view can be linked to, and a test can open one.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const PER_PAGE = 25;
  const RIGHT = 0.5; // a score of at least this is called right
  const FILTERS = {
    all: () => true,
    right: (a) => isRight(a) === true,
    wrong: (a) => isRight(a) === false,
    noscore: (a) => isRight(a) === null,
    differ: (a, b) => b !== null && isRight(a) !== isRight(b),
    better: (a, b) => b !== null && isRight(a) === true && isRight(b) === false,
    worse: (a, b) => b !== null && isRight(a) === false && isRight(b) === true,
    changed: (a, b) => b !== null && text(a) !== text(b),
  };
  const TWO_RUNS = new Set(["differ", "better", "worse", "changed"]);
  const state = { task: data.tasks[0]?.name ?? "", a: 0, b: -1, filter: "all", search: "", page: 1 };

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

  function readHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    const names = data.tasks.map((task) => task.name);
    const run = (value, least) => {
      const number = Number.parseInt(value, 10);
      return number >= least && number < data.runs.length ? number : least;
    };
    state.task = names.includes(given.get("task")) ? given.get("task") : state.task;
    state.a = run(given.get("a") ?? state.a, 0);
    state.b = run(given.get("b") ?? state.b, -1);
    state.filter = Object.hasOwn(FILTERS, given.get("filter")) ? given.get("filter") : state.filter;
    state.search = given.get("search") ?? state.search;
    state.page = Math.max(1, Number.parseInt(given.get("page") ?? state.page, 10) || 1);
  }

  function writeHash() {
    const hash = new URLSearchParams(Object.entries(state).map(([k, v]) => [k, String(v)]));
    history.replaceState(null, "", `#${hash}`);
  }

  function matches(question) {
    const a = question.answers[state.a];
    const b = state.b < 0 ? null : question.answers[state.b];
    if (a === null || (TWO_RUNS.has(state.filter) && b === null)) return false;
    if (!FILTERS[state.filter](a, b)) return false;
    const wanted = state.search.toLowerCase();
    const searched = [question.question, question.reference, text(a), text(b)];
    return !wanted || searched.some((part) => part && part.toLowerCase().includes(wanted));
  }

  function picture(question) {
    const source = data.images[question.image];
    if (!source) return element("div", "blank", question.imageNote);
    const image = element("img");
    image.src = source;
    image.alt = "the question's image";
    image.loading = "lazy";
    return image;
  }

  function answerLine(answer, name, title) {
    const right = isRight(answer);
    const line = element("div", "answer");
    const run = element("span", "run", name);
    run.title = title;
    const kind = right === null ? "none" : right ? "right" : "wrong";
    const words = { none: "no score", right: "right", wrong: "wrong" };
    const shown = answer.prediction === null ? answer.excluded ?? "no answer" : answer.prediction;
    line.append(run, element("span", `mark ${kind}`, words[kind]), element("span", "text", shown));
    if (answer.score !== null && answer.score > 0 && answer.score < 1) {
      line.append(element("span", "run", `score ${answer.score.toFixed(2)}`));
    }
    return line;
  }

  function card(question) {
    const made = element("article", "sample");
    made.dataset.id = question.id;
    const body = element("div");
    body.append(
      element("div", "question", question.question),
      element("div", "reference", question.reference === null ? "reference hidden" : `reference: ${question.reference}`),
      answerLine(question.answers[state.a], "A", data.runs[state.a]),
    );
    if (state.b >= 0 && question.answers[state.b] !== null) {
      body.append(answerLine(question.answers[state.b], "B", data.runs[state.b]));
    }
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
    const left = task && task.leftOut ? ` (${task.leftOut} more are not on this page)` : "";
    get("count").textContent = `${found.length} of ${task ? task.questions.length : 0} questions${left}`;
    get("place").textContent = `page ${state.page} of ${pages}`;
    get("previous").disabled = state.page <= 1;
    get("next").disabled = state.page >= pages;
    for (const name of ["task", "a", "b", "filter", "search"]) get(name).value = String(state[name]);
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

  function start() {
    fill(get("task"), data.tasks.map((task) => [task.name, task.name]));
    const runs = data.runs.map((name, place) => [String(place), name]);
    fill(get("a"), runs);
    fill(get("b"), [["-1", "none"], ...runs]);
    for (const name of ["task", "a", "b", "filter", "search"]) {
      get(name).addEventListener("input", (event) => {
        const value = event.target.value;
        state[name] = name === "a" || name === "b" ? Number(value) : value;
        if (state.b < 0 && TWO_RUNS.has(state.filter)) state.filter = "all";
        state.page = 1;
        writeHash();
        show();
      });
    }
    for (const [name, step] of [["previous", -1], ["next", 1]]) {
      get(name).addEventListener("click", () => {
        state.page += step;
        writeHash();
        show();
        get("browser").scrollIntoView();
      });
    }
    window.addEventListener("hashchange", () => {
      if (!location.hash.includes("=")) return; // a link to a section
      readHash();
      show();
    });
    readHash();
    show();
  }

  start();
})();
