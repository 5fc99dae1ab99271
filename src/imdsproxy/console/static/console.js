// What pages do beside htmx: the stream of requests, rows of forms, and where the focus goes.
"use strict";

const MOST_ROWS = 300;

function cell(row, text, name) {
  const made = row.insertCell();
  made.textContent = text;
  if (name) made.className = name;
  return made;
}

// Every text of a guest is put in as text, never as HTML.
function addRequest(body, guests, one) {
  const row = body.insertRow(0);
  const at = new Date(one.at * 1000);
  cell(row, at.toTimeString().slice(0, 8) + "." + String(at.getMilliseconds()).padStart(3, "0"), "mono");
  cell(row, one.network || "–");
  cell(row, one.address || "–");
  const who = cell(row, one.instance ? "" : "–");
  if (one.instance) {
    const link = document.createElement("a");
    link.href = guests + encodeURIComponent(one.instance);
    link.textContent = one.instance;
    who.append(link);
  }
  cell(row, (one.method || "–") + " " + one.path, "mono wide");
  cell(row, one.status, "right " + (one.status < 400 ? "ok" : "failed"));
  cell(row, one.answered_by);
  cell(row, one.milliseconds, "right");
}

function watchRequests(table) {
  const body = table.tBodies[0], state = document.getElementById("stream");
  // Apart from the state, so that a screen reader does not read out every number.
  const count = document.getElementById("seen");
  const pause = document.getElementById("pause");
  let seen = 0, paused = false, waiting = [];
  const show = () => {
    if (waiting.length && body.querySelector(".empty")) body.replaceChildren();
    for (const one of waiting) addRequest(body, table.dataset.guests, one);
    waiting = [];
    while (body.rows.length > MOST_ROWS) body.deleteRow(-1);
  };
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    pause.textContent = paused ? "Resume" : "Pause";
    if (!paused) show();
  });
  const source = new EventSource(table.dataset.stream);
  source.onmessage = (event) => {
    const answer = JSON.parse(event.data);
    if (answer.problem) {
      state.textContent = answer.problem + (answer.hint ? " (" + answer.hint + ")" : "");
      count.textContent = "";
      return;
    }
    waiting.push(...answer.requests);
    waiting = waiting.slice(-MOST_ROWS);
    seen += answer.requests.length;
    if (!paused) show();
    count.textContent = seen + (seen === 1 ? " request" : " requests");
    const text = answer.missed ? "Watching (some requests are not shown):" : "Watching:";
    if (state.textContent !== text) state.textContent = text;
  };
  source.onerror = () => { state.textContent = "The stream broke off; reconnecting"; };
  window.addEventListener("pagehide", () => source.close());
}

function addRow(button) {
  const body = button.parentElement.querySelector("tbody");
  const row = body.rows[body.rows.length - 1].cloneNode(true);
  for (const one of row.querySelectorAll("[name]")) {
    one.name = one.id = one.name.replace(/\[[0-9]+\]/, "[" + body.rows.length + "]");
    one.value = "";
  }
  body.append(row);
  row.querySelector("[name]").focus();
}

const requests = document.getElementById("requests");
if (requests) watchRequests(requests);
for (const button of document.querySelectorAll("[data-more]")) {
  button.hidden = false;
  button.addEventListener("click", () => addRow(button));
}
const errors = document.getElementById("errors");
if (errors) errors.focus();
