// Runs the served page's own script with stand-ins for a browser: node tests/page.js PAGE.html
"use strict";
const html = require("fs").readFileSync(process.argv[2], "utf8");
const script = html.split("<script>")[1].split("</script>")[0];
const made = {};
const element = () => ({
  className: "", textContent: "", value: "", disabled: false, append() {}, replaceChildren() {},
  classList: { add() {}, remove() {} }, focus() {}, click() {},
});
const at = (id) => (made[id] ??= element());
global.document = { getElementById: at, createElement: element };
const sent = [], answer = [];
global.fetch = (address, options) => {
  const model = { id: "x", parameters: 1, state_bytes: 1 };
  if (address === "v1/models") return Promise.resolve({ json: async () => ({ data: [model] }) });
  sent.push(JSON.parse(options.body).messages);
  return new Promise((give, fail) => {
    options.signal.addEventListener("abort", () => fail(new Error("aborted")));
    answer.push((text) => give({ ok: true, body: new Blob([text]).stream() }));
  });
};
(0, eval)(script + `
  globalThis.conversation = () => messages.map((one) => one.role).join(" ");
  picture = "data:shown";`);
const said = [];
const ask = (question) => {
  at("question").value = question;
  return at("form").onsubmit({ preventDefault() {} });
};
const words = (text) => `data: ${JSON.stringify({ choices: [{ delta: { content: text } }] })}\n\n`;
(async () => {
  const first = ask("one");
  await ask("while the first is answered");
  said.push(["asked", sent.length, at("ask").disabled]);
  at("again").onclick();
  await first;
  said.push(["after New", conversation(), at("ask").disabled]);
  const second = ask("two");
  answer[1](words("ha"));
  await second;
  said.push(["broken off", conversation()]);
  const third = ask("three");
  answer[2](`${words("ye")}${words("s")}data: [DONE]\n\n`);
  await third;
  said.push(["answered", conversation(), at("ask").disabled]);
  ask("four");
  const shown = sent.map((one) => JSON.stringify(one).split("data:shown").length - 1);
  said.push(["pictures", shown.join(" "), "messages", sent.map((one) => one.length).join(" ")]);
  console.log(JSON.stringify(said));
})();
