"use strict";

const byId = (id) => document.getElementById(id);
let running = null;

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

function bodyOf(model) {
  const prompt = byId("prompt").value;
  const body = {
    model,
    max_tokens: Number(byId("tokens").value),
    temperature: Number(byId("temperature").value),
    stream: true,
    stream_options: { include_usage: true },
    milora: { return_route: true },
  };
  const wording = byId("wording").value;
  if (wording === "chat") return ["/v1/chat/completions", { ...body, messages: [{ role: "user", content: prompt }] }];
  return ["/v1/completions", { ...body, prompt: wording === "instruction" ? INSTRUCTION.join(prompt) : prompt }];
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

async function askOne(model, signal) {
  const article = byId("answer").content.firstElementChild.cloneNode(true);
  article.querySelector("h2").textContent = model;
  byId("answers").append(article);
  const text = article.querySelector(".text"), used = article.querySelector(".used"), table = article.querySelector(".route");
  table.hidden = true;
  try {
    const [path, body] = bodyOf(model);
    const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    const begin = performance.now();
    for await (const event of eventsOf(answer)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (choice) text.textContent += choice.text ?? choice.delta.content ?? "";
      if (event.milora) { drawRoute(table, event.milora); table.hidden = false; }
      if (event.usage) used.textContent = `${event.usage.completion_tokens} tokens in ${((performance.now() - begin) / 1000).toFixed(1)} s`;
    }
  } catch (error) {
    used.textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
}

byId("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const models = [...document.querySelectorAll("#models input:checked")].map((box) => box.value);
  byId("problem").textContent = models.length ? "" : "Choose at least one adapter.";
  if (!models.length) return;
  byId("answers").replaceChildren();
  running = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  await Promise.all(models.map((model) => askOne(model, running.signal)));
  byId("send").disabled = false;
  byId("stop").disabled = true;
});
byId("stop").addEventListener("click", () => running?.abort());
listModels().catch((error) => { byId("problem").textContent = error.message; });
