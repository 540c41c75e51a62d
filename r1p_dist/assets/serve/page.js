"use strict";

const at = (id) => document.getElementById(id);
let model = null, picture = null, number = 0;

// Texts come from data: they are only ever set as text, never as markup.
function make(tag, text, parent) {
  const element = document.createElement(tag);
  if (text !== null) element.textContent = text;
  parent.append(element);
  return element;
}

function drawTask(result) {
  const table = make("table", null, at("results"));
  if (result.task !== null) make("caption", result.task, table);
  const states = ["before", "after"].filter((state) => state in result.classes[0]);
  const head = make("tr", null, make("thead", null, table));
  for (const name of ["class", ...states]) make("th", name, head).scope = "col";
  const body = make("tbody", null, table);
  for (const line of result.classes) {
    const row = make("tr", null, body);
    make("th", line.class, row).scope = "row";
    for (const state of states) make("td", `${(100 * line[state]).toFixed(1)} %`, row);
  }
}

function drawAnswer(state, text) {
  const section = make("section", null, at("results"));
  make("strong", state, section);
  make("p", text || "(nothing)", section).className = "answer";
}

function drawFound(found) {
  if (model.answers) ["before", "after"].filter((state) => state in found).forEach((s) => drawAnswer(s, found[s]));
  else found.tasks.forEach(drawTask);
}

async function predict() {
  if (!picture || !model) return;
  const mine = ++number;
  if (picture.size > model.most_bytes) {
    at("state").textContent = `A picture may have ${model.most_bytes >> 20} MB; this one has more.`;
    return;
  }
  const query = new URLSearchParams();
  if (model.answers) query.set("ask", at("question").value);
  else if (at("classes").value.trim()) query.set("classes", at("classes").value);
  at("state").textContent = "The model looks at it …";
  let message = "";
  try {
    const headers = { "Content-Type": "application/octet-stream" };
    const response = await fetch(`/predict?${query}`, { method: "POST", headers, body: picture });
    const found = await response.json();
    if (mine !== number) return;  // another one was asked for since
    at("results").replaceChildren();
    if (response.ok) drawFound(found);
    else message = found.error;
  } catch {
    message = "The server does not answer; is it still running?";
  }
  if (mine === number) at("state").textContent = message;
}

function choose(file) {
  if (!file) return;
  URL.revokeObjectURL(at("preview").src);
  picture = file;
  at("preview").src = URL.createObjectURL(file);
  at("preview").hidden = false;
  at("results").replaceChildren();
  predict();
}

async function start() {
  model = await (await fetch("/model.json")).json();
  at("name").textContent = document.title = model.name;
  at("classes-field").hidden = model.answers;
  at("question-field").hidden = !model.answers;
  predict();  // a picture may have been chosen by now
}

at("file").addEventListener("change", (event) => choose(event.target.files[0]));
at("form").addEventListener("submit", (event) => { event.preventDefault(); predict(); });
for (const name of ["dragover", "dragleave", "drop"]) {
  // anywhere on the page, or the browser would leave it for the picture
  document.addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") choose(event.dataTransfer.files[0]);
  });
}
start();
