"use strict";
// All text of dialogues, names and tokens becomes text nodes: nothing here makes markup of a string.

const ROW_HEIGHT = 30, FILES_KEPT = 48;
const SPECIAL = 1, ROLE_WORD = 2, CONTENT = 8, FIRST = 16, ROLE_SHIFT = 5;
const ROLES = ["", "system", "user", "assistant", "tool"];
const at = (id) => document.getElementById(id);

let index = null, columns = {}, texts = [], names = new Map();
let shown = new Uint32Array(0), chosen = 0, opened = null, descending = true;
const files = new Map(), waiting = new Map();

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// ---- data

function fastcacheIndex(given) {
  index = given;
  for (const [name, text] of Object.entries(given.columns)) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    columns[name] = new Float32Array(bytes.buffer);
  }
  names = new Map(given.names);
  texts = given.peaks.map((peaks, latent) => [names.get(latent) ?? "", ...peaks].join("\n").toLowerCase());
  const { sae, dialogues, tokens, split } = given.about;
  at("about").textContent = `${sae.d_sae.toLocaleString("en")} latents of ${sae.name}; ` +
    `${dialogues.toLocaleString("en")} dialogues, ${tokens.all.toLocaleString("en")} tokens, split ${split}.`;
  at("only").hidden = !given.judged;
  offerSorting();
  refresh();
  openFromAddress();
}

function fastcacheLatents(number, records) {
  files.set(number, records);
  if (files.size > FILES_KEPT) files.delete(files.keys().next().value);
  for (const { resolve } of waiting.get(number) ?? []) resolve(records);
  waiting.delete(number);
}

function load(number) {
  if (files.has(number)) return Promise.resolve(files.get(number));
  return new Promise((resolve, reject) => {
    const others = waiting.get(number);
    if (others) return others.push({ resolve, reject });
    waiting.set(number, [{ resolve, reject }]);
    const source = `data/latents-${String(number).padStart(5, "0")}.js`;
    const script = element("script", { src: source });
    // A whole file has called fastcacheLatents by the time it is loaded.
    script.onload = script.onerror = () => {
      for (const each of waiting.get(number) ?? []) each.reject(new Error(`${source} can't be loaded; it should lie, whole, beside this page.`));
      waiting.delete(number);
      script.remove();
    };
    document.head.append(script);
  });
}

// ---- the list

function offerSorting() {
  const sets = index.sets.map((name) => [`density_${name}`, name === "all" ? "by density" : `by density on ${name.replaceAll("_", " ")}`]);
  const offered = [["number", "by number"], ...sets, ["max_activation", "by highest activation"], ["mean_activation", "by mean activation"]];
  if (index.judged) offered.push(["score", "by score"], ["detection", "by detection"]);
  at("sort").replaceChildren(...offered.map(([value, text]) => element("option", { value }, text)));
  at("sort").value = index.judged ? "score" : "density_all";
}

function found() {
  const query = at("search").value.trim().toLowerCase(), number = /^#?\d+$/.test(query) ? Number(query.replace("#", "")) : -1;
  const onlyScored = at("scored").checked;
  const latents = [];
  for (let latent = 0; latent < texts.length; latent++) {
    if (onlyScored && Number.isNaN(columns.score[latent])) continue;
    if (!query || latent === number || texts[latent].includes(query)) latents.push(latent);
  }
  return Uint32Array.from(latents);
}

function sorted(latents) {
  const column = columns[at("sort").value], sign = descending ? -1 : 1;
  if (!column) return descending ? latents.reverse() : latents;
  return latents.sort((a, b) => {
    const one = column[a], other = column[b];
    if (one === other) return a - b;
    if (Number.isNaN(one) || Number.isNaN(other)) return Number.isNaN(one) - Number.isNaN(other) || a - b;  // last, either way
    return sign * (one - other);
  });
}

function refresh() {
  at("direction").textContent = descending ? "↓" : "↑";
  shown = sorted(found());
  chosen = Math.max(0, opened === null ? 0 : shown.indexOf(opened));
  const total = texts.length.toLocaleString("en");
  at("count").textContent = shown.length === texts.length ? `${total} latents` : `${shown.length.toLocaleString("en")} of ${total} latents`;
  at("rows").style.height = `${shown.length * ROW_HEIGHT}px`;
  at("list").scrollTop = 0;
  choose(chosen);
}

function drawRows() {
  const list = at("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - 4);
  const last = Math.min(shown.length, first + Math.ceil(list.clientHeight / ROW_HEIGHT) + 9);
  const rows = [];
  for (let place = first; place < last; place++) rows.push(row(place));
  at("rows").replaceChildren(...rows);
  if (chosen >= first && chosen < last) list.setAttribute("aria-activedescendant", `row-${shown[chosen]}`);
  else list.removeAttribute("aria-activedescendant");
}

function row(place) {
  const latent = shown[place], density = columns.density_all[latent], score = columns.score?.[latent];
  const made = element("div", { id: `row-${latent}`, className: density ? "row" : "row dead", role: "option",
    "aria-selected": String(place === chosen), "aria-setsize": String(shown.length), "aria-posinset": String(place + 1) },
    element("span", {}, `#${latent}`), element("span", {}, label(latent)), element("span", { className: "figure", title: "density" }, share(density)),
    element("span", { className: "figure", title: "score" }, score >= 0 ? String(score) : ""));
  made.style.top = `${place * ROW_HEIGHT}px`;
  made.addEventListener("click", () => { choose(place); open(latent); });
  return made;
}

function choose(place) {
  chosen = Math.min(Math.max(place, 0), Math.max(shown.length - 1, 0));
  const list = at("list"), top = chosen * ROW_HEIGHT;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
  drawRows();
}

const visible = (token) => token.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
const peaks = (latent) => [...new Set(index.peaks[latent].map((token) => visible(token).trim() || "␣"))].join(" · ");
const label = (latent) => names.get(latent) ?? (columns.density_all[latent] ? peaks(latent) : "never active");
const share = (value) => value ? `${(100 * value).toPrecision(value < 0.001 ? 2 : 3)}%` : "0";

// ---- one latent

async function open(latent) {
  opened = latent;
  if (location.hash !== `#${latent}`) history.replaceState(null, "", `#${latent}`);
  const page = at("latent");
  try {
    const records = await load(Math.floor(latent / index.perFile));
    if (opened !== latent) return;  // another was asked for meanwhile
    page.replaceChildren(...describe(latent, records[latent % index.perFile]));
    at("said").textContent = `Latent ${latent}, ${label(latent)}`;
  } catch (error) {
    if (opened !== latent) return;
    page.replaceChildren(element("p", {}, error.message));
  }
  page.scrollTop = 0;
}

function describe(latent, record) {
  const heading = element("h2", {}, `#${latent}`, names.has(latent) ? ` ${names.get(latent)}` : "");
  const maximum = columns.max_activation[latent];
  const figures = element("p", { className: "soft" }, `active on ${share(columns.density_all[latent])} of the tokens (${record.active.toLocaleString("en")}), ` +
    `highest ${maximum.toPrecision(3)}, mean ${columns.mean_activation[latent].toPrecision(3)}`);
  const parts = [heading, figures, ...judgement(latent, record),
    element("div", { className: "columns" }, densities(latent), histogram(record.histogram), tokensOf("Promotes", record.promoted), tokensOf("Suppresses", record.suppressed)),
    neighbours(record.neighbours)];
  for (const [kind, title] of [["t", "Highest activations, each of another dialogue"], ["d", "Drawn, from its quantiles"]]) {
    const contexts = record.contexts.filter((each) => each.k === kind);
    if (contexts.length) parts.push(element("h3", {}, title), ...contexts.map((each) => context(each, maximum)));
  }
  return parts;
}

function judgement(latent, record) {
  if (record.answer === null && record.failure === null) return [];
  const score = columns.score[latent], detection = columns.detection[latent];
  const told = record.failure ? `no score: ${record.failure}` : `score ${score} of 5`;
  const also = Number.isNaN(detection) ? "" : `, detection ${detection.toFixed(2)}`;
  const answer = element("details", {}, element("summary", {}, `Judge: ${told}${also}`), element("blockquote", {}, record.answer ?? ""));
  return [answer];
}

function densities(latent) {
  const values = index.sets.map((name) => [name, columns[`density_${name}`][latent]]).filter(([name]) => index.about.tokens[name]);
  const largest = Math.max(...values.map(([, value]) => value), 1e-12);
  const rows = values.map(([name, value]) => {
    const bar = element("span", { className: "bar" });
    bar.style.width = `${90 * value / largest}px`;
    return element("tr", {}, element("th", {}, name.replaceAll("_", " ")), element("td", { className: "figure" }, share(value)), element("td", {}, bar));
  });
  return element("section", {}, element("h3", {}, "Density by kind of token"), element("table", { id: "densities" }, ...rows));
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function histogram(counts) {
  const some = counts.map((count, bin) => count ? bin : -1).filter((bin) => bin >= 0);
  const section = element("section", {}, element("h3", {}, "Activations"));
  if (!some.length) return section;
  const first = some[0], last = some.at(-1), width = 22, height = 90, highest = Math.max(...counts);
  const drawing = svg("svg", { id: "histogram", width: (last - first + 1) * width + 20, height: height + 18, role: "img", "aria-label": "Histogram of activations, a bar for each doubling" });
  for (let bin = first; bin <= last; bin++) {
    const tall = counts[bin] ? Math.max(1, height * counts[bin] / highest) : 0, x = (bin - first) * width;
    const from = 2 ** (bin + index.lowest);
    const bar = svg("rect", { x: x + 1, y: height - tall, width: width - 2, height: tall });
    bar.append(svg("title", {}, `${from} to ${2 * from}: ${counts[bin].toLocaleString("en")} tokens`));
    drawing.append(bar);
    if ((bin - first) % 2 === 0) drawing.append(svg("text", { x, y: height + 13 }, from >= 1 ? String(from) : from.toPrecision(1)));
  }
  section.append(drawing);
  return section;
}

function tokensOf(title, pairs) {
  if (!pairs.length) return "";
  const rows = pairs.slice(0, 8).map(([token, value]) => element("tr", {}, element("td", { className: "tokens" }, visible(token)), element("td", { className: "figure" }, value.toFixed(2))));
  return element("section", {}, element("h3", {}, title), element("table", {}, ...rows));
}

function neighbours(pairs) {
  const links = pairs.map(([latent, cosine]) => {
    const link = element("button", { type: "button" }, `#${latent} ${label(latent)} (${cosine.toFixed(2)})`);
    link.addEventListener("click", () => {
      if (shown.includes(latent)) choose(shown.indexOf(latent));
      open(latent);
      at("latent").focus();
    });
    return link;
  });
  return links.length ? element("section", { className: "links" }, element("h3", {}, "Nearest decoder rows, by cosine"), ...links) : "";
}

function context(given, maximum) {
  const values = new Map(given.a), peak = given.p - given.s;
  const tokens = given.t.map((token, place) => {
    const type = given.y[place], value = values.get(place) ?? 0;
    const special = type & (SPECIAL | ROLE_WORD);
    const kinds = ["token", special ? "special" : type & CONTENT ? "" : "template", type & FIRST ? "first" : "", place === peak ? "peak" : ""];
    const made = element("span", { className: kinds.filter(Boolean).join(" "), title: `${value ? value.toPrecision(3) : 0}${special ? ", special token" : ""}` }, visible(token));
    if (value) made.style.setProperty("--heat", (0.08 + 0.77 * Math.min(1, value / maximum)).toFixed(3));
    return made;
  });
  const role = ROLES[given.y[peak] >> ROLE_SHIFT] ?? "";
  const where = `${given.v}  dialogue ${given.d} (corpus row ${given.r}), token ${given.p}${role ? `, ${role}` : ""}`;
  return element("div", { className: "context" }, element("div", { className: "where" }, where), element("div", { className: "tokens" }, ...tokens));
}

// ---- keys and address

function openFromAddress() {
  const latent = Number(location.hash.slice(1));
  if (location.hash && Number.isInteger(latent) && latent >= 0 && latent < texts.length) {
    open(latent);
    choose(Math.max(0, shown.indexOf(latent)));
  }
}

function openChosen() {
  if (shown.length) open(shown[chosen]);
}

const KEYS = {
  ArrowDown: () => choose(chosen + 1),
  ArrowUp: () => choose(chosen - 1),
  PageDown: () => choose(chosen + 15),
  PageUp: () => choose(chosen - 15),
  Home: () => choose(0),
  End: () => choose(shown.length - 1),
  Enter: openChosen,
  j: () => { choose(chosen + 1); openChosen(); },
  k: () => { choose(chosen - 1); openChosen(); },
  "/": () => { at("search").focus(); at("search").select(); },
  Escape: () => at("list").focus(),
};
const IN_SEARCH = new Set(["ArrowDown", "ArrowUp", "Enter", "Escape"]);

document.addEventListener("keydown", (event) => {
  const action = KEYS[event.key], place = document.activeElement;
  if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
  if (place === at("search") ? !IN_SEARCH.has(event.key) : ["SELECT", "INPUT", "BUTTON", "SUMMARY"].includes(place.tagName) && event.key !== "Escape") return;
  if (place === at("latent") && !["j", "k", "/", "Escape"].includes(event.key)) return;  // it scrolls
  event.preventDefault();
  action();
});
at("search").addEventListener("input", refresh);
at("scored").addEventListener("change", refresh);
at("sort").addEventListener("change", () => { descending = at("sort").value !== "number"; refresh(); });
at("direction").addEventListener("click", () => { descending = !descending; refresh(); });
at("list").addEventListener("scroll", drawRows);
window.addEventListener("resize", drawRows);
window.addEventListener("hashchange", openFromAddress);
