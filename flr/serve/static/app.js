"use strict";

// Okabe and Ito's colours, told apart with any colour vision; the same as in the reports.
const COLOURS = ["#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2", "#999999"];
const INKS = ["#000", "#000", "#000", "#000", "#000", "#000", "#fff", "#000"]; // what reads best on each of them
const colour = (factor) => COLOURS[factor % COLOURS.length];
const $ = (id) => document.getElementById(id);
const state = { history: [], info: null, shown: null, chosen: 0, step: null, factor: null, example: 0, number: 0 };

/** Element with attributes, listeners (on…), and children; text is never taken for HTML. */
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(node.style, value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function percent(value, digits = 0) {
  if (value > 0 && value < 0.001 && digits) return value < 1e-5 ? "< 0.001 %" : `${(100 * value).toPrecision(1)} %`;
  return `${(100 * value).toFixed(value < 0.1 ? digits : 0)} %`;
}

const named = (item) => item.title.trim() || item.item_id;

// ---------------------------------------------------------------- the API

function token() {
  return sessionStorage.getItem("flr-token");
}

function askToken() {
  return new Promise((resolve) => {
    $("login").addEventListener("close", () => resolve($("token").value.trim()), { once: true });
    $("token").value = "";
    $("login").showModal();
  });
}

async function call(path, body) {
  for (let attempt = 0; ; attempt++) {
    const headers = body ? { "content-type": "application/json" } : {};
    if (token()) headers.authorization = `Bearer ${token()}`;
    let reply;
    try {
      reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
    } catch {
      throw new Error("The server does not answer.");
    }
    if (reply.status === 401) {
      sessionStorage.setItem("flr-token", await askToken());
      continue;
    }
    if (reply.status === 429 && attempt < 3) {
      const seconds = Number(reply.headers.get("retry-after")) || 1;
      say(`The server is busy; trying again in ${seconds} s.`);
      await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
      continue;
    }
    const answer = await reply.json();
    if (!reply.ok) throw new Error([answer.error, ...answer.details.map((d) => `${d.loc.join(".")}: ${d.msg}`)].join(" · "));
    return answer;
  }
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// ---------------------------------------------------------------- history

function add(item) {
  if (state.history.length >= state.info.max_history) return say(`At most ${state.info.max_history} items.`, true);
  state.history.push(item);
  changed();
}

function move(place, by) {
  const [item] = state.history.splice(place, 1);
  state.history.splice(place + by, 0, item);
  changed();
  $("history").children[place + by].querySelector(by < 0 ? ".up" : ".down").focus();
}

function remove(place) {
  state.history.splice(place, 1);
  changed();
  const next = $("history").children[Math.min(place, state.history.length - 1)];
  (next ? next.querySelector(".remove") : $("query")).focus();
}

function drawHistory() {
  const last = state.history.length - 1;
  const used = state.info ? state.info.used_history : Infinity;
  $("history").replaceChildren(
    ...state.history.map((item, place) => {
      const name = named(item);
      const far = last - place >= used;
      const button = (kind, sign, label, off, act) =>
        el("button", { type: "button", class: kind, "aria-label": label, title: label, disabled: off, onclick: act }, sign);
      return el("li", { class: far ? "far" : "", title: far ? `${name}: too far back, not seen by the model` : name },
        el("span", { class: "place", "aria-hidden": "true" }, String(place + 1)),
        el("span", { class: "name" }, name),
        button("up", "↑", `Move ${name} earlier`, place === 0, () => move(place, -1)),
        button("down", "↓", `Move ${name} later`, place === last, () => move(place, 1)),
        button("remove", "✕", `Remove ${name}`, false, () => remove(place)));
    }),
  );
  $("empty").hidden = state.history.length > 0;
  $("clear").disabled = state.history.length === 0;
  $("count").textContent = state.history.length ? `${state.history.length} ${state.history.length === 1 ? "item" : "items"}, oldest first` : "";
}

let timer = 0;
function changed() {
  drawHistory();
  clearTimeout(timer);
  timer = setTimeout(ask, 150);
}

// ---------------------------------------------------------------- type-ahead (ARIA combobox with a list box)

const search = { items: [], active: -1, timer: 0, number: 0 };

function marked(text, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const low = text.toLowerCase();
  if (low.length !== text.length) return [text]; // places would not agree
  const bold = new Array(text.length).fill(false);
  for (const word of words) {
    for (let at = low.indexOf(word); at >= 0; at = low.indexOf(word, at + 1)) bold.fill(true, at, at + word.length);
  }
  const parts = [];
  for (let at = 0; at < text.length; ) {
    let end = at;
    while (end < text.length && bold[end] === bold[at]) end++;
    parts.push(bold[at] ? el("mark", {}, text.slice(at, end)) : text.slice(at, end));
    at = end;
  }
  return parts;
}

function closeOptions() {
  search.number++;
  search.items = [];
  search.active = -1;
  $("options").hidden = true;
  $("query").setAttribute("aria-expanded", "false");
  $("query").removeAttribute("aria-activedescendant");
}

function activate(place) {
  search.active = place;
  [...$("options").children].forEach((option, i) => option.setAttribute("aria-selected", String(i === place)));
  if (place < 0) return $("query").removeAttribute("aria-activedescendant");
  $("query").setAttribute("aria-activedescendant", `option-${place}`);
  $("options").children[place].scrollIntoView({ block: "nearest" });
}

function pick(place) {
  const item = search.items[place];
  $("query").value = "";
  closeOptions();
  if (item) add(item);
}

async function find() {
  const query = $("query").value;
  const number = ++search.number;
  if (!query.trim()) return closeOptions();
  let found;
  try {
    found = await call(`v1/items?limit=12&q=${encodeURIComponent(query)}`);
  } catch (error) {
    return say(error.message, true);
  }
  if (number !== search.number) return; // typed on meanwhile
  search.items = found.items;
  $("options").replaceChildren(
    ...found.items.map((item, i) =>
      el("li", { id: `option-${i}`, role: "option", "aria-selected": "false", onmousedown: (e) => e.preventDefault(), onclick: () => pick(i) },
        el("span", {}, ...marked(named(item), query)), el("span", { class: "id" }, item.item_id))),
  );
  if (!found.items.length) $("options").append(el("li", { class: "none", role: "option", "aria-disabled": "true" }, "Nothing in the catalogue matches"));
  $("options").hidden = false;
  $("query").setAttribute("aria-expanded", "true");
  activate(found.items.length ? 0 : -1);
}

$("query").addEventListener("input", () => {
  clearTimeout(search.timer);
  search.timer = setTimeout(find, 80);
});
$("query").addEventListener("blur", closeOptions);
$("query").addEventListener("keydown", (event) => {
  const size = search.items.length;
  if (event.key === "Escape") closeOptions();
  else if (event.key === "ArrowDown" && !size) find();
  else if (event.key === "ArrowDown") activate((search.active + 1) % size);
  else if (event.key === "ArrowUp" && size) activate((search.active + size - 1) % size);
  else if (event.key === "Enter" && size) pick(search.active);
  else return;
  event.preventDefault();
});

// ---------------------------------------------------------------- asking and showing

async function ask() {
  const number = ++state.number;
  document.body.classList.add("waiting");
  try {
    const answer = await call("v1/explain", {
      history: state.history.map((item) => item.item_id),
      k: Number($("k").value),
      exclude_seen: $("exclude").checked,
      scoring: $("scoring").value,
    });
    if (number !== state.number) return; // asked again meanwhile
    state.shown = answer;
    state.chosen = 0;
    state.step = null;
    say("");
    draw();
  } catch (error) {
    if (number === state.number) say(error.message, true);
  } finally {
    if (number === state.number) document.body.classList.remove("waiting");
  }
}

function draw() {
  drawLegend();
  drawList();
  drawFactors();
  document.body.dataset.answered = String(state.number);
}

function drawLegend() {
  const { num_factors: factors } = state.shown;
  $("legend").replaceChildren(
    ...Array.from({ length: factors }, (_, k) =>
      el("button", { type: "button", "aria-pressed": String(state.factor === k), onclick: () => { state.factor = state.factor === k ? null : k; draw(); } },
        el("span", { class: "swatch", style: { background: colour(k) } }), `Factor ${k + 1}`)),
  );
}

const dim = (k) => (state.factor !== null && state.factor !== k ? " dim" : "");

function drawList() {
  const { recommendations: items, num_factors: factors } = state.shown;
  const largest = Math.exp(Math.max(...items.map((item) => item.score)));
  const { effects } = state.shown;
  const head = el("tr", {}, el("th", { scope: "col" }, el("span", { class: "unseen" }, "Rank")), el("th", { scope: "col" }, "Item"), el("th", { scope: "col" }, "Probability"),
    effects ? el("th", { scope: "col" }, "Effect of the factors, nats", axis(effects)) : null);
  const rows = items.map((item, place) => {
    const chance = Math.exp(item.score);
    const chosen = factors > 0 && place === state.chosen;
    const choose = () => { state.chosen = place; draw(); $("list").querySelectorAll(".what button")[place].focus({ preventScroll: true }); };
    return el("tr", { class: chosen ? "chosen" : "", onclick: choose },
      el("td", { class: "rank" }, String(place + 1)),
      el("td", { class: "what" }, el("button", { type: "button", "aria-pressed": String(chosen) }, named(item)), el("span", { class: "id" }, item.item_id)),
      el("td", { class: "chance", title: `log-probability ${item.score.toFixed(3)}` },
        el("div", { class: "row" },
          el("div", { class: "track" }, el("div", { class: "fill", style: { width: `${(100 * chance) / largest}%` } })),
          el("span", { class: "number" }, percent(chance, 1)))),
      effects ? el("td", { class: "why" }, stack(item, effects, effects.items[place])) : null);
  });
  $("list").replaceChildren(items.length
    ? el("table", { class: "items" }, el("thead", {}, head), el("tbody", {}, ...rows))
    : el("p", { class: "hint" }, "No item is left to recommend."));
  $("notice").textContent = effects ? effects.notice : "";
  $("list-note").textContent = factors
    ? "Coloured bars: by how many nats each factor raised or lowered the log-probability (Shapley values, they add up to the effect of all together; one nat makes an item ×2.7 as likely). A bar of a probability is relative to the greatest. Choose an item to see below where its factors looked."
    : `This model (${state.shown.variant}) has no factors to show.`;
}

/** The axis of the stacks: its ticks as the server gives them. */
function axis({ ticks }) {
  const at = (place) => ({ left: `${(100 * place) / (ticks.length - 1)}%` });
  return el("div", { class: "ticks", "aria-hidden": "true" },
    ...ticks.map((tick, place) => el("span", { style: at(place) }, signed(tick, tick === 0 ? 0 : null))));
}

const signed = (value, digits = null) =>
  (value > 0 ? "+" : value < 0 ? "−" : "") + (digits === null ? String(Math.abs(value)) : Math.abs(value).toFixed(digits));

/** Contributions of one item as a stack to either side of zero, and what they come to. */
function stack(item, { ticks, zero }, effect) {
  const box = el("div", { class: "stack", role: "img" });
  const words = item.contributions.map((c, k) => `factor ${k + 1} ${signed(c, 3)} nats, ${effect.times[k]}`);
  box.setAttribute("aria-label", words.join("; "));
  ticks.forEach((_, place) => box.append(el("i", { style: { left: `${(100 * place) / (ticks.length - 1)}%` } })));
  effect.bars.forEach(([left, width], k) =>
    box.append(el("span", { class: `part${dim(k)}`, title: words[k], style: { left: `${100 * left}%`, width: `${100 * width}%`, background: colour(k), color: INKS[k % INKS.length] } },
      width > 0.07 ? `F${k + 1}` : "")));
  box.append(el("span", { class: "zero", style: { left: `${100 * zero}%` } }));
  const scores = `log-probability ${signed(effect.score, 3)}, without the factors ${signed(effect.base_score, 3)}`;
  const text = `${effect.total_times} (${signed(effect.total, 3)} nats: ${scores})`;
  return el("div", {}, box, el("div", { class: "total" }, text));
}

function drawFactors() {
  const { attention, gates, norms, history, recommendations, num_factors: factors } = state.shown;
  $("factors").hidden = factors === 0;
  if (!factors) return;
  const steps = attention.flatMap((refinements, n) => refinements.map((_, t) => [n, t]));
  const last = steps.length - 1;
  const at = state.step === null ? last : Math.min(state.step, last);
  const [thought, refinement] = steps[at];
  $("steps").replaceChildren(
    ...(last ? steps : []).map(([n, t], i) =>
      el("button", { type: "button", "aria-pressed": String(i === at), onclick: () => { state.step = i; drawFactors(); } },
        (attention.length > 1 ? `Thought ${n + 1}, r` : "R") + `efinement ${t + 1}`)),
  );
  const alpha = attention[thought][refinement];
  const gate = gates[thought][refinement];
  const largest = Math.max(...alpha.flat(), 1e-9);
  const chosen = recommendations[state.chosen];
  const weight = chosen && history.map((_, m) => chosen.factor_shares.reduce((sum, share, k) => sum + share * attention.at(-1).at(-1)[k][m], 0));
  const each = (make) => Array.from({ length: factors }, (_, k) => make(k));
  const head = el("tr", {}, el("th", { scope: "col" }, "History, oldest first"),
    ...each((k) => el("th", { scope: "col", class: `part${dim(k)}` }, el("span", { class: "swatch", style: { background: colour(k) } }), `F${k + 1}`)),
    chosen ? el("th", { scope: "col", class: "for" }, `For “${short(named(chosen), 22)}”`) : null);
  const gateRow = el("tr", { class: "gates" }, el("th", { scope: "row" }, "gate: weight in the thought"),
    ...each((k) => el("td", { class: `part${dim(k)}`, title: `length of its part of the thought: ${norms[thought][k].toFixed(2)} input embeddings` },
      el("div", { class: "gate" }, el("div", { style: { width: `${100 * gate[k]}%`, background: colour(k) } })), percent(gate[k]))),
    chosen ? el("td", { class: "for" }) : null);
  const rows = history.map((item, m) =>
    el("tr", { class: item.used ? "" : "far" },
      el("th", { scope: "row", title: named(item) + (item.used ? "" : " (too far back, not seen)") }, el("span", { class: "place" }, String(m + 1)), named(item)),
      ...each((k) => el("td", { class: `part${dim(k)}` }, cell(alpha[k][m], largest, k))),
      chosen ? el("td", { class: "for" }, el("div", { class: "bar" },
        el("div", { class: "track" }, el("div", { class: "fill", style: { width: `${100 * weight[m]}%` } })),
        el("span", { class: "number" }, percent(weight[m])))) : null));
  $("heat").replaceChildren(el("table", { class: "map" }, el("thead", {}, head), el("tbody", {}, gateRow, ...rows)));
  $("heat-note").textContent = history.length
    ? "Each factor's attention over the history: a column adds up to 100 %, less what went to other parts of the prompt. Last column: attention weighted by the factors' shares of the chosen item; it says where they looked, not what would change without that item."
    : "With an empty history there is nothing to look at.";
}

const short = (text, length) => (text.length <= length ? text : `${text.slice(0, length - 1).trimEnd()}…`);

/** Heat-map cell: the factor's colour over the panel's, and the ink that reads best on that. */
function cell(value, largest, factor) {
  if (value < 0.005) return el("div", { class: "cell nothing" }, percent(value));
  const strength = 0.92 * Math.min(value / largest, 1);
  const ground = channels(getComputedStyle(document.documentElement).getPropertyValue("--panel").trim());
  const own = channels(colour(factor));
  const mixed = own.map((c, i) => strength * c + (1 - strength) * ground[i]);
  const light = ([r, g, b]) => [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ink = light(mixed) > 0.179 ? "#000000" : "#ffffff";
  return el("div", { class: "cell", style: { background: `rgb(${mixed.map(Math.round).join(" ")})`, color: ink } }, percent(value));
}

function channels(text) {
  if (text.startsWith("#")) return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
  return text.match(/[\d.]+/g).slice(0, 3).map(Number);
}

// ---------------------------------------------------------------- colours, buttons, start

const THEMES = ["system", "light", "dark"];
function applyTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").firstElementChild.textContent = { system: "◐", light: "☀", dark: "☾" }[theme];
  $("theme").setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system" : theme}`);
  $("theme").title = $("theme").getAttribute("aria-label");
  if (state.shown) draw();
}
let theme = localStorage.getItem("flr-theme") || "system";
$("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  localStorage.setItem("flr-theme", theme);
  applyTheme(theme);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => applyTheme(theme));

$("example").addEventListener("click", () => {
  const examples = state.info.examples;
  state.history = [...examples[state.example++ % examples.length]];
  changed();
});
$("clear").addEventListener("click", () => {
  state.history = [];
  changed();
  $("query").focus();
});
$("k").addEventListener("input", () => {
  $("k-value").textContent = $("k").value;
  changed();
});
$("exclude").addEventListener("change", changed);
$("scoring").addEventListener("change", changed);

async function start() {
  applyTheme(theme);
  drawHistory();
  try {
    state.info = await call("v1/info");
  } catch (error) {
    return say(error.message, true);
  }
  const { num_items: items, num_factors: factors, variant, codec, max_k: most } = state.info;
  $("about").textContent = `${items.toLocaleString("en")} items · ${factors ? `${factors} ${factors === 1 ? "factor" : "factors"}` : variant} · codec ${codec} · FLR ${state.info.version}`;
  $("scoring").value = state.info.scoring;
  $("k").max = Math.min(20, most);
  $("k-value").textContent = $("k").value;
  $("example").hidden = state.info.examples.length === 0;
  ask();
}
start();
