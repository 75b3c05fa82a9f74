"use strict";

const table = document.getElementById("records");
const { group, packed } = JSON.parse(document.getElementById("details").textContent);
const unpacked = new Map(); // index of a group -> promise of its records

// -- small helpers --

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children); // strings are appended as text, never as HTML
  return made;
}

const whole = (value) => Math.round(value).toLocaleString("en-US");
const fixed = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const percent = (share) => (100 * share).toFixed(1) + " %";

const counted = (number, noun) => `${whole(number)} ${noun}${number === 1 ? "" : "s"}`;

function shown(token) {
  const text = token.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return text === "" ? "∅" : text;
}

function detailsOf(number) {
  const place = Math.floor(number / group);
  if (!unpacked.has(place)) {
    const bytes = Uint8Array.from(atob(packed[place]), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(place, new Response(stream).json());
  }
  return unpacked.get(place).then((records) => records[number % group]);
}

// -- one record --

function strip(thoughts) {
  const chips = make("div", { class: "strip" });
  const seen = make("div", { class: "seen", "aria-live": "polite" });
  thoughts.forEach(([tokens], i) => {
    const [token, chance] = tokens[0] ?? ["", 0];
    const title = `thought ${i + 1}: ${shown(token)} ${percent(chance)}`;
    const style = `--p: ${chance}`;
    chips.append(make("button", { type: "button", title, style, "aria-pressed": false }, shown(token)));
  });
  chips.addEventListener("click", ({ target }) => {
    const number = [...chips.children].indexOf(target);
    if (number < 0) return;
    [...chips.children].forEach((chip, i) => chip.setAttribute("aria-pressed", i === number));
    const [tokens, entropy, norm, before, nearest, cosine] = thoughts[number];
    const rows = tokens.map(([token, chance]) =>
      make("tr", {}, make("td", {}, shown(token)), make("td", { class: "n" }, percent(chance))),
    );
    seen.replaceChildren(
      `thought ${number + 1} of ${thoughts.length}`,
      make("table", {}, make("tbody", {}, ...rows)),
      `entropy ${fixed(entropy, 2)} nats, norm ${fixed(norm, 3)}, cosine to the thought before ` +
        `${fixed(before, 2)}, nearest token ${shown(nearest)} (${fixed(cosine, 2)})`,
    );
  });
  return [chips, seen];
}

function folded(title, text, open) {
  const made = make("details", {}, make("summary", {}, title), make("pre", {}, text));
  made.open = open;
  return made;
}

function agentCard(agent, isLast) {
  const thought = agent.thought ? counted(agent.thought, "thought") : "";
  const card = make("div", { class: "agent" });
  card.append(make("h4", {}, make("span", {}, agent.name), make("small", {}, thought)));
  if (agent.thoughts.length) card.append(...strip(agent.thoughts));
  card.append(folded(`prompt, ${counted(agent.read, "token")}`, agent.prompt, false));
  if (agent.text) card.append(folded(`generated, ${counted(agent.written, "token")}`, agent.text, isLast));
  return card;
}

function heatMap(agents) {
  const rows = agents.flatMap((agent) =>
    Object.entries(agent.attention).map(([part, shares]) => [`${agent.name}, ${part}`, shares]),
  );
  if (!rows.length) return [];
  const layers = rows[0][1].length;
  const others = rows.map(([, shares]) => shares);
  const rest = rows[0][1].map((_, i) => Math.max(0, 1 - others.reduce((sum, x) => sum + (x[i] ?? 0), 0)));
  const last = agents.at(-1).name;
  const most = Math.max(...others.flat(), 1e-9); // without the own turn, whose share is far larger
  const map = make("div", { class: "heatmap" });
  map.style.gridTemplateColumns = `max-content repeat(${layers}, minmax(2px, 2.25rem)) max-content`;
  const every = Math.ceil(layers / 8);
  map.append(make("em"));
  for (let i = 0; i < layers; i += 1) map.append(make("em", {}, i % every ? "" : String(i)));
  map.append(make("em", {}, "mean"));
  for (const [name, shares] of [...rows, [`${last}, own turn`, rest]]) {
    map.append(make("span", {}, name));
    shares.forEach((share, i) => {
      const title = `${name}, layer ${i}: ${percent(share)}`;
      map.append(make("i", { title, style: `--p: ${Math.min(1, share / most)}` }));
    });
    map.append(make("b", {}, percent(shares.reduce((sum, x) => sum + x, 0) / layers)));
  }
  const scale = make("span", { class: "scale heat" }, "0", make("i"), `${percent(most)} and more`);
  const legend = `Share of the attention of ${last} per layer, mean over heads and tokens: `;
  return [make("h3", {}, "Attention"), map, make("p", { class: "legend" }, legend, scale)];
}

function bill(agents) {
  const head = ["", "prompt tokens", "thoughts", "generated", "seconds", "KV cache, MB"];
  const cells = (one) => [
    whole(one.read), whole(one.thought), whole(one.written), fixed(one.seconds, 2),
    fixed(one.memory_bytes / 1e6, 2),
  ];
  const total = { memory_bytes: Math.max(0, ...agents.map((agent) => agent.memory_bytes)) };
  for (const name of ["read", "thought", "written", "seconds"]) {
    total[name] = agents.reduce((sum, agent) => sum + agent[name], 0);
  }
  const rows = [...agents, { name: "total", ...total }].map((one) =>
    make("tr", {}, make("th", { scope: "row" }, one.name), ...cells(one).map((x) => make("td", {}, x))),
  );
  return make(
    "table", { class: "bill" },
    make("thead", {}, make("tr", {}, ...head.map((name) => make("th", {}, name)))),
    make("tbody", {}, ...rows),
  );
}

function facts(details) {
  const found = [];
  if (details.finish_reason === "length") found.push("The answer was cut off at the token limit.");
  if (details.gold_tokens) {
    found.push(`Loss of the right answer: ${fixed(details.nll, 3)} nats per token, ${whole(details.gold_tokens)} tokens.`);
  }
  for (const [name, values] of [["Losses of the options", details.options], ["Votes", details.votes]]) {
    const pairs = Object.entries(values ?? {}).map(([key, value]) => `${key} ${+Number(value).toFixed(3)}`);
    if (pairs.length) found.push(`${name}: ${pairs.join(", ")}.`);
  }
  return found.map((text) => make("p", { class: "legend" }, text));
}

function panel(details) {
  const { agents } = details;
  const made = make("td", { colspan: table.tHead.rows[0].cells.length });
  const cards = make("div", { class: "agents" });
  cards.append(...agents.map((one, i) => agentCard(one, i === agents.length - 1)));
  const width = ({ text }) => (text.length > 80 ? "minmax(18rem, 2fr)" : "minmax(13rem, 1fr)");
  cards.style.gridTemplateColumns = agents.map(width).join(" ");
  made.append(cards);
  if (agents.some((agent) => agent.thoughts.length)) {
    const scale = make("span", { class: "scale" }, "0", make("i"), "1");
    made.append(make("p", { class: "legend" },
      "Thoughts as their likeliest token, coloured by its probability ", scale, ". Click one for more."));
  } else if (agents.some((agent) => agent.thought)) {
    made.append(make("p", { class: "legend" }, "Thoughts and attention were not recorded; see --lens."));
  }
  const read = heatMap(agents);
  const below = make("div", { class: "below" });
  if (read.length) below.append(make("div", {}, ...read));
  below.append(make("div", { class: "scroll" }, make("h3", {}, "Tokens and time"), bill(agents)));
  made.append(...facts(details), below);
  return made;
}

async function toggle(body, number) {
  const open = body.classList.toggle("open");
  body.querySelector(".question button").setAttribute("aria-expanded", open);
  if (body.rows.length > 1) {
    body.rows[1].hidden = !open;
    return;
  }
  const row = make("tr", { class: "details" });
  body.append(row); // before the details are loaded, so that a second click finds the row
  try {
    row.append(panel(await detailsOf(number)));
  } catch (error) {
    const text = `The details cannot be shown (${error.message}); a newer browser may show them.`;
    row.append(make("td", { colspan: table.tHead.rows[0].cells.length }, text));
  }
}

// -- the table --

function sortBy(heading, bodies) {
  const column = [...heading.parentNode.cells].indexOf(heading);
  const down = heading.getAttribute("aria-sort") === "ascending";
  const isNumber = heading.dataset.sort === "number";
  const value = (body) => {
    const text = body.rows[0].cells[column].textContent.trim();
    return isNumber ? parseFloat(text.replaceAll(",", "")) : text;
  };
  const compare = (a, b) => {
    if (isNumber) return Number.isNaN(a) || Number.isNaN(b) ? Number.isNaN(a) - Number.isNaN(b) : a - b;
    return a.localeCompare(b, "en", { numeric: true });
  };
  const keys = new Map(bodies.map((body) => [body, value(body)]));
  const sorted = [...bodies].sort((a, b) => compare(keys.get(a), keys.get(b)) * (down ? -1 : 1));
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  table.append(...sorted);
}

function start() {
  const bodies = [...table.tBodies];
  const texts = bodies.map((body) => body.textContent.toLowerCase());
  const [filter, grade, arm, count, none] = ["filter", "grade", "arm", "count", "none"].map((id) =>
    document.getElementById(id),
  );
  const show = () => {
    const wanted = filter.value.trim().toLowerCase();
    let number = 0;
    bodies.forEach((body, i) => {
      const fits = texts[i].includes(wanted) && (!grade.value || body.dataset.grade === grade.value);
      body.hidden = !(fits && (!arm?.value || body.dataset.arm === arm.value));
      number += !body.hidden;
    });
    count.textContent = `${whole(number)} of ${whole(bodies.length)}`;
    none.hidden = number > 0;
  };
  document.getElementById("filters").addEventListener("input", show);
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  table.tHead.addEventListener("click", ({ target }) => {
    const heading = target.closest("th");
    if (heading) sortBy(heading, bodies);
  });
  bodies.forEach((body, i) => {
    body.rows[0].addEventListener("click", () => {
      if (String(getSelection()) === "") toggle(body, i); // a click, not the end of a selection
    });
  });
  show();
}

if (table) start();
