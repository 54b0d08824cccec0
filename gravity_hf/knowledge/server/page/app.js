"use strict";

const byId = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
const state = { beliefs: [], on: new Set(), chat: [], running: null, model: "" };
const MOST_SHOWN = 200;

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  // Text of the model or of a belief is never markup.
  if (text !== undefined) node.textContent = text;
  return node;
}

function headers() {
  const token = byId("token").value.trim();
  return { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };
}

async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers() });
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* The status is all there is. */ }
  const wait = response.headers.get("Retry-After");
  throw new Error(wait ? `${message} (in ${wait} s)` : message);
}

function complain(error) {
  byId("problem").textContent = error ? error.message : "";
  byId("problem").hidden = !error;
}

async function loadStatus() {
  const health = await (await ask("health")).json();
  state.model = health.model;
  const routing = health.routing === "calibrated"
    ? "finds beliefs by text" : "uses beliefs by name only: none is found by text";
  byId("status").textContent = `${health.model} · base ${health.base_digest.slice(0, 12)} ` +
    `${health.base_hash_verified ? "verified" : "NOT verified"} · ${routing}`;
}

async function loadBeliefs() {
  const list = await (await ask("beliefs")).json();
  state.beliefs = list.beliefs;
  const ids = new Set(list.beliefs.map((belief) => belief.id));
  state.on.forEach((id) => ids.has(id) || state.on.delete(id));
  showBeliefs(list.count);
}

function showBeliefs(count = state.beliefs.length) {
  const wanted = byId("filter").value.trim().toLowerCase();
  const says = (belief) => belief.prompt === null
    ? "a delta without a fact" : `${belief.prompt} ${belief.answer}`;
  const found = state.beliefs.filter((belief) =>
    `${belief.key} ${says(belief)}`.toLowerCase().includes(wanted));
  byId("count").textContent = `${Math.min(found.length, MOST_SHOWN)} of ${count} shown, ` +
    `${state.on.size} switched on`;
  byId("beliefs").replaceChildren(...found.slice(0, MOST_SHOWN).map((belief) => {
    const item = make("li"), label = make("label"), box = make("input");
    box.type = "checkbox";
    box.checked = state.on.has(belief.id);
    box.addEventListener("change", () => toggle(belief.id, box.checked));
    label.append(box, make("span", "key", belief.key), make("span", "says", says(belief)));
    item.dataset.id = belief.id;
    item.append(label);
    return item;
  }));
}

function toggle(id, on) {
  if (on) state.on.add(id); else state.on.delete(id);
  document.querySelector("input[name=use][value=chosen]").checked = true;
  byId("count").textContent = byId("count").textContent.replace(/\d+ switched/, `${state.on.size} switched`);
}

function body(text) {
  const shared = {
    max_tokens: Number(byId("tokens").value),
    temperature: Number(byId("temperature").value),
    stream: true,
  };
  const use = chosen("use");
  if (use === "none") shared.use_knowledge = false;
  if (use === "chosen") shared.beliefs = [...state.on];
  if (chosen("mode") === "complete") return ["v1/completions", { ...shared, prompt: text }];
  const messages = [...state.chat, { role: "user", content: text }];
  return ["v1/chat/completions", { ...shared, messages }];
}

/** The JSON objects of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function begin(text, isCompletion) {
  const turn = make("li", "writing"), answer = make("p", "answer");
  if (isCompletion) answer.append(make("span", "given", text));
  else turn.append(make("p", "asked", text));
  const written = document.createTextNode("");
  answer.append(written);
  turn.append(answer);
  byId("turns").append(turn);
  byId("empty").hidden = true;
  return [turn, written];
}

function percent(value) {
  return `${Math.round(100 * value)} %`;
}

function showSources(turn, provenance) {
  const facts = make("div", "facts");
  facts.setAttribute("aria-label", "Sources");
  const { confidence, uncertain, sources, stale } = provenance;
  if (!sources.length) {
    facts.append(make("span", "base", "base model alone, no belief"));
  } else if (confidence === null) {
    facts.append(make("span", "confidence", "confidence not calibrated"));
  } else {
    const how = uncertain ? "unsure" : "sure";
    facts.append(make("span", `confidence ${how}`,
      `confidence ${percent(confidence)}${uncertain ? ", uncertain" : ""}${stale ? ", stale" : ""}`));
  }
  for (const source of sources) {
    const chip = make("span", "source");
    const effect = source.effect === null ? "" : ` · moves the first token by ${source.effect.toFixed(2)} nats`;
    chip.append(make("b", "", source.key), ` v${source.version} · similarity ${source.score.toFixed(2)}${effect}`);
    facts.append(chip);
  }
  turn.append(facts);
  const used = new Set(sources.map((source) => source.id));
  document.querySelectorAll("#beliefs li").forEach((item) =>
    item.classList.toggle("used", used.has(item.dataset.id)));
}

async function send() {
  const text = byId("prompt").value;
  if (!text.trim() || state.running) return;
  complain(null);
  const [path, content] = body(text);
  const isCompletion = path === "v1/completions";
  const [turn, written] = begin(text, isCompletion);
  state.running = new AbortController();
  busy(true);
  try {
    const response = await ask(path, {
      method: "POST", body: JSON.stringify(content), signal: state.running.signal,
    });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        written.data += (isCompletion ? choice.text : choice.delta.content) ?? "";
        if (choice.finish_reason) showSources(turn, choice.provenance);
      }
    }
    if (!isCompletion) {
      state.chat.push({ role: "user", content: text }, { role: "assistant", content: written.data });
    }
    byId("prompt").value = "";
  } catch (error) {
    const stopped = error.name === "AbortError";
    turn.append(make("p", stopped ? "hint" : "failed", stopped ? "stopped" : "no answer"));
    if (!stopped) complain(error);
  } finally {
    turn.classList.remove("writing");
    state.running = null;
    busy(false);
    byId("prompt").focus();
    turn.scrollIntoView({ block: "nearest" });
  }
}

function busy(is) {
  byId("send").disabled = is;
  byId("stop").disabled = !is;
}

function stop() {
  if (state.running) state.running.abort();
}

function clear() {
  stop();
  state.chat = [];
  byId("turns").replaceChildren();
  byId("empty").hidden = false;
  complain(null);
  byId("prompt").focus();
}

async function load() {
  try {
    await loadStatus();
    await loadBeliefs();
    complain(null);
  } catch (error) {
    byId("status").textContent = "not connected";
    complain(error);
  }
}

byId("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
byId("stop").addEventListener("click", stop);
byId("clear").addEventListener("click", clear);
byId("filter").addEventListener("input", () => showBeliefs());
byId("token").addEventListener("change", load);
window.addEventListener("focus", () => { if (!state.running) loadBeliefs().catch(() => {}); });
load();
