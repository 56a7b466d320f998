"use strict";

const byId = (id) => document.getElementById(id);
let running = null;
const chats = new Map(); // of each model: its article, its messages and its last route

async function listModels() {
  const answer = await fetch("/v1/models");
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  const models = (await answer.json()).data.map((model) => model.id);
  for (const [i, name] of models.entries()) {
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", value: name, checked: i < 3 });
    label.append(box, ` ${name}`);
    byId("models").append(label);
  }
}

function bodyOf(model, prompt, messages) {
  const body = {
    model,
    max_tokens: Number(byId("tokens").value),
    temperature: Number(byId("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
    milora: { return_route: true },
  };
  if (messages) return ["/v1/chat/completions", { ...body, messages }];
  const instruction = byId("wording").value === "instruction";
  return ["/v1/completions", { ...body, prompt: instruction ? INSTRUCTION.join(prompt) : prompt }];
}

// The text of server-sent events as it comes: an event ends with an empty line, wherever the network cuts it.
async function* eventsOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function drawRoute(table, { experts, route }) {
  const head = table.querySelector("thead tr");
  head.replaceChildren(head.firstElementChild);
  table.querySelector("tbody").replaceChildren();
  for (const expert of experts) head.append(Object.assign(document.createElement("th"), { textContent: expert, scope: "col" }));
  const most = Math.max(...route.flat(), 1e-9);
  route.forEach((weights, layer) => {
    const row = table.querySelector("tbody").insertRow();
    row.append(Object.assign(document.createElement("th"), { textContent: layer, scope: "row" }));
    weights.forEach((weight, i) => {
      const cell = row.insertCell();
      cell.title = `layer ${layer}, ${experts[i]}: ${weight.toFixed(3)}`;
      cell.style.background = weight ? `color-mix(in srgb, var(--strong) ${Math.round((55 * weight) / most)}%, transparent)` : "";
      cell.textContent = weight ? (Math.abs(weight - Math.round(weight)) < 5e-3 ? Math.round(weight) : weight.toFixed(2)) : "";
    });
  });
}

// How a turn's route differs from the one before; of a chat whose adapter reads its first turn alone it does not.
function compared(route, before) {
  if (!before) return "";
  const others = route.filter((weights, layer) => weights.some((weight, i) => weight !== before[layer][i])).length;
  return others ? `; ${others} of ${route.length} layers route otherwise than before` : "; the route is that of the turn before";
}

function added(template, parent) {
  const element = byId(template).content.firstElementChild.cloneNode(true);
  parent.append(element);
  return element;
}

function chatOf(model) {
  if (!chats.has(model)) {
    const article = added("answer", byId("answers"));
    article.querySelector("h2").textContent = model;
    article.querySelector(".route").hidden = true;
    chats.set(model, { article, messages: [], route: null });
  }
  return chats.get(model);
}

async function askOne(model, prompt, signal) {
  const chat = chatOf(model), table = chat.article.querySelector(".route");
  const turn = added("turn", chat.article.querySelector(".turns"));
  const text = turn.querySelector(".text"), used = turn.querySelector(".used");
  const messages = chatting() ? [...chat.messages, { role: "user", content: prompt }] : null;
  if (messages) turn.querySelector(".asked").textContent = prompt;
  let apart = "";
  try {
    const [path, body] = bodyOf(model, prompt, messages);
    const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    const begin = performance.now();
    for await (const event of eventsOf(answer)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice) text.textContent += choice.text ?? choice.delta.content ?? "";
      if (event.milora) {
        apart = compared(event.milora.route, chat.route);
        chat.route = event.milora.route;
        drawRoute(table, event.milora);
        table.hidden = false;
      }
      if (event.usage) {
        const { completion_tokens: written, prompt_tokens: read, prompt_tokens_details: details } = event.usage;
        const cached = details?.cached_tokens ? `; ${details.cached_tokens} of ${read} prompt tokens cached` : "";
        used.textContent = `${written} tokens in ${((performance.now() - begin) / 1000).toFixed(1)} s${cached}${apart}`;
      }
    }
    if (messages) chat.messages = [...messages, { role: "assistant", content: text.textContent }];
  } catch (error) {
    used.textContent = error.name === "AbortError" ? "stopped" : error.message;
    if (messages) used.textContent += " (this turn is left out of the chat)";
  }
}

function chatting() {
  return byId("wording").value === "chat";
}

function forget() {
  chats.clear();
  byId("answers").replaceChildren();
  byId("fresh").disabled = true;
}

byId("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const models = [...document.querySelectorAll("#models input:checked")].map((box) => box.value);
  byId("problem").textContent = models.length ? "" : "Choose at least one adapter.";
  if (!models.length) return;
  if (!chatting()) forget();
  const prompt = byId("prompt").value;
  if (chatting()) byId("prompt").value = "";
  running = new AbortController();
  byId("send").disabled = byId("wording").disabled = byId("fresh").disabled = true;
  byId("stop").disabled = false;
  await Promise.all(models.map((model) => askOne(model, prompt, running.signal)));
  byId("send").disabled = byId("wording").disabled = false;
  byId("fresh").disabled = !chatting();
  byId("stop").disabled = true;
});
byId("stop").addEventListener("click", () => running?.abort());
byId("fresh").addEventListener("click", forget);
byId("wording").addEventListener("change", forget);
listModels().catch((error) => { byId("problem").textContent = error.message; });
