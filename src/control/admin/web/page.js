// Reads /status every other second and shows what has changed in between. Nothing else is fetched.
"use strict";

const EVERY = 2000, TIMEOUT = 1900, WINDOW = 10, KEPT = 300;
const PHASES = {queue: "queue", connect: "connect", first_byte: "first byte", transfer: "transfer"};
const NORMAL = new Set(["finished", "drained", "client_left", "answered", "opaque"]);

/** What was read in the last minutes, oldest first. */
let history = [];
let lostSince = null;
/** The ends of sessions and requests that were not normal, latest first, with when they were seen. */
let ends = [];

const byId = (id) => document.getElementById(id);

/** An element with text or children. Nothing is ever parsed as HTML. */
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Makes an element's children like these. What is there already stays: focus, selection, scrolling. */
function fill(element, ...children) {
  const next = make(element.tagName, {}, ...children);
  [...next.childNodes].forEach((child, at) => {
    const old = element.childNodes[at];
    if (!old) element.append(child);
    else if (old.nodeName !== child.nodeName) old.replaceWith(child);
    else if (child.nodeType === Node.TEXT_NODE) { if (old.data !== child.data) old.data = child.data; }
    else like(old, child);
  });
  while (element.childNodes.length > children.length) element.lastChild.remove();
}

function like(old, next) {
  for (const {name} of [...old.attributes]) if (name !== "style" && !next.hasAttribute(name)) old.removeAttribute(name);
  for (const {name, value} of next.attributes) if (name !== "style" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  // A style attribute would be refused, as it should be.
  if (old.style.cssText !== next.style.cssText) old.style.cssText = next.style.cssText;
  fill(old, ...next.childNodes);
}

const number = (value) => value.toLocaleString("en", {maximumFractionDigits: value < 10 ? 1 : 0});
/** A sidecar takes a few hundredths of a core. */
const cores = (value) => value.toFixed(2);
const percent = (share) => `${number(share * 100)} %`;

function bytes(value) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000 || unit === "GB") return `${number(value)} ${unit}`;
    value /= 1000;
  }
}

function time(seconds) {
  if (seconds === null) return "–";
  if (seconds === Infinity) return "> 14 h";
  if (seconds < 0.001) return `${number(seconds * 1e6)} µs`;
  return seconds < 1 ? `${number(seconds * 1e3)} ms` : `${number(seconds)} s`;
}

function age(seconds) {
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const at = Math.max(0, parts.findIndex(([length]) => seconds >= length));
  const [length, unit] = seconds < 1 ? parts[3] : parts[at];
  return `${Math.floor(seconds / length)} ${unit}`;
}

/** The reading that the latest one is compared with. */
function before() {
  const now = history[history.length - 1];
  return history.find((reading) => now.alive - reading.alive <= WINDOW + 1) || now;
}

/** A counter's growth a second. */
function rate(now, then, of) {
  const seconds = now.alive - then.alive;
  return seconds > 0 ? Math.max(0, of(now) - of(then)) / seconds : 0;
}

const total = (rows) => (rows || []).reduce((sum, {count}) => sum + count, 0);

/** The durations that were counted between two readings of a phase. */
function between(now, then) {
  const counts = now.counts.map((count, at) => Math.max(0, count - ((then && then.counts[at]) || 0)));
  return {counts, sum: Math.max(0, now.sum - (then ? then.sum : 0))};
}

/** The upper bound of the bucket that a share of all durations does not pass. */
function percentile({counts}, share, bounds) {
  const all = counts.reduce((sum, count) => sum + count, 0);
  if (all === 0) return null;
  let seen = 0;
  for (let at = 0; at < counts.length; at++) {
    seen += counts[at];
    if (seen >= all * share) return bounds[at] === null ? Infinity : bounds[at];
  }
  return Infinity;
}

function sparkline(values, label) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${KEPT} 30`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  const most = Math.max(...values.map(([, value]) => value), 1e-9);
  const latest = values.length ? values[values.length - 1][0] : 0;
  const points = values.map(([at, value]) =>
    `${(KEPT - (latest - at)).toFixed(1)},${(29 - 27 * value / most).toFixed(1)}`);
  if (points.length > 1) {
    const first = points[0].split(",")[0];
    for (const [kind, all] of [["polygon", [`${first},30`, ...points, `${KEPT},30`]], ["polyline", points]]) {
      const shape = document.createElementNS("http://www.w3.org/2000/svg", kind);
      shape.setAttribute("points", all.join(" "));
      shape.setAttribute("class", kind === "polygon" ? "area" : "curve");
      svg.append(shape);
    }
  }
  return svg;
}

/** A number that changes, with the curve of the last minutes. `of` takes a reading and the one before. */
function tile(name, show, of) {
  const curve = [];
  for (let at = 1; at < history.length; at++) {
    const value = of(history[at], history[at - 1]);
    if (value !== null) curve.push([history[at].alive, value]);
  }
  const now = of(history[history.length - 1], before());
  const most = Math.max(0, ...curve.map(([, value]) => value));
  const label = `${name}: now ${show(now || 0)}, at most ${show(most)} in the last minutes`;
  return make("div", {class: "tile"}, make("div", {class: "name"}, name),
    make("div", {class: "value"}, show(now || 0)), sparkline(curve, label));
}

function level(name, {now, max}, show = number) {
  const children = [make("div", {class: "name"}, name)];
  if (max === null || max === undefined) {
    children.push(make("div", {class: "value"}, show(now)));
  } else {
    children.push(make("div", {class: "value"}, show(now), make("span", {class: "dim"}, ` of ${show(max)}`)));
    children.push(make("meter", {min: 0, max, value: now, low: max * 0.8, high: max * 0.95, optimum: 0, "aria-label": `${name}: ${show(now)} of ${show(max)}`}));
  }
  return make("div", {class: "tile"}, ...children);
}

const word = (health) => make("span", {class: "word", "data-word": health.word}, health.word);

function reasons(health) {
  if (!health.reasons.length) return [];
  const line = ({problem, words, lasts}) => make("li", {"data-problem": problem},
    words, ...(lasts === null ? [] : [make("span", {class: "dim"}, ` (for ${age(lasts)})`)]));
  return [make("ul", {class: "reasons"}, ...health.reasons.map(line))];
}

function table(caption, columns, rows) {
  const head = make("tr", {}, ...columns.map((column) => make("th", {scope: "col"}, column)));
  const body = rows.map(([first, ...rest]) => make("tr", {}, make("th", {scope: "row"}, first),
    ...rest.map((cell) => make("td", {}, cell))));
  const all = make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": caption}, all);
}

/** Where the time of clients goes. */
function latency(route, then, bounds) {
  const phases = Object.entries(PHASES).map(([name, words]) =>
    ({name, words, ...between(route.phases[name], then && then.phases[name])}));
  const whole = phases.reduce((sum, phase) => sum + phase.sum, 0);
  const share = (phase) => whole > 0 ? phase.sum / whole : 0;
  const label = whole > 0
    ? "Where the time goes: " + phases.map((phase) => `${phase.words} ${percent(share(phase))}`).join(", ")
    : "Where the time goes: nothing was measured in the last ten seconds";
  const bar = make("div", {class: "bar", role: "img", "aria-label": label},
    ...phases.filter((phase) => phase.sum > 0).map((phase) => {
      const part = make("span", {class: phase.name});
      part.style.width = `${share(phase) * 100}%`;
      return part;
    }));
  const rows = phases.map((phase) => [
    make("span", {}, make("span", {class: `key ${phase.name}`}), phase.words),
    whole > 0 ? percent(share(phase)) : "–",
    ...[0.5, 0.9, 0.99].map((of) => time(percentile(phase, of, bounds))),
    number(phase.counts.reduce((sum, count) => sum + count, 0)),
  ]);
  return [table("Where the time goes", ["part", "share", "p50 ≤", "p90 ≤", "p99 ≤", "measured"], rows), bar];
}

function endpoints(route, then) {
  const all = route.sessions_active || route.endpoints.reduce((sum, one) => sum + one.sessions_active, 0);
  const rows = route.endpoints.map((one) => {
    const old = then && then.endpoints.find((other) => other.name === one.name && other.address === one.address);
    const grown = (of) => Math.max(0, of(one) - (old ? of(old) : 0));
    const [segments, again] = [grown((e) => e.segments), grown((e) => e.retransmits)];
    const [sum, count] = [grown((e) => e.rtt.sum), grown((e) => e.rtt.count)];
    return [
      one.name,
      String(one.address),
      one.why ? `${one.state}: ${one.why}` : one.state,
      number(one.sessions_active),
      all ? percent(one.sessions_active / all) : "–",
      `${number(one.pool_idle)} of ${number(one.pool_target)}`,
      number(one.connect_failures),
      number(one.ejections),
      count ? time(sum / count) : "–",
      segments ? percent(again / segments) : "–",
    ];
  });
  const more = route.endpoints_total - route.endpoints.length;
  const caption = more > 0 ? `Endpoints (${more} more in /backends)` : "Endpoints";
  const columns = ["endpoint", "address", "state", "sessions", "share", "warm", "failed connects", "ejections", "network RTT", "sent again"];
  return table(caption, columns, rows);
}

const allEnds = (route) => [...route.closed.map((end) => ({...end, of: "session"})),
  ...(route.requests || []).map((end) => ({...end, of: "request"}))].filter(({how}) => !NORMAL.has(how));

/** Takes note of ends that were not normal. */
function watchEnds(now, then) {
  for (const [at, route] of now.routes.entries()) {
    const old = then ? allEnds(then.routes[at]) : [];
    for (const end of allEnds(route)) {
      const same = old.find(({of, how}) => of === end.of && how === end.how);
      const news = end.count - (same ? same.count : 0);
      if (then && news > 0) ends.unshift({at: now.now, route: route.name, ...end, news});
    }
  }
  ends = ends.slice(0, 50);
}

function lastEnds(route) {
  const of = ends.filter((one) => one.route === route.name).slice(0, 8);
  const title = make("h3", {}, "Ends that were not normal");
  if (!of.length) {
    const before = allEnds(route).map(({of, how, count}) => `${count} ${of}s ${how}`);
    const words = before.length ? `None since this page was opened; before: ${before.join(", ")}.` : "None.";
    return [title, make("p", {class: "dim"}, words)];
  }
  const line = (one) => make("li", {}, `${new Date(one.at * 1000).toLocaleTimeString("en-GB")}: ${one.news} ${one.of}${one.news > 1 ? "s" : ""}, ${one.how}. ${one.words.replaceAll("`", "")}`);
  return [title, make("ul", {class: "reasons"}, ...of.map(line))];
}

function discovery({generation, age: since, trouble}) {
  const fresh = since === null ? "" : `; its source answered ${age(since)} ago`;
  return make("p", {class: "dim"}, `Endpoints: generation ${generation}${fresh}.${trouble ? ` ${trouble}` : ""}`);
}

function showRoute(at) {
  const now = history[history.length - 1], then = before();
  const route = now.routes[at], old = then.routes[at];
  const of = (read) => (a, b) => rate(a, b, (reading) => read(reading.routes[at]));
  const tiles = [
    tile("sessions", number, (a) => a.routes[at].sessions_active),
    tile("new sessions a second", number, of((r) => r.sessions_opened)),
    tile("to backends, a second", bytes, of((r) => r.bytes.to_backend || 0)),
    tile("to clients, a second", bytes, of((r) => r.bytes.to_client || 0)),
  ];
  if (route.requests) {
    tiles.splice(2, 0, tile("requests a second", number, of((r) => total(r.requests))));
    tiles.push(level("requests in the queue", route.queue));
  }
  if (route.clients_waiting) tiles.push(level("wait for an endpoint", {now: route.clients_waiting, max: null}));
  const id = `route-${at}`;
  let section = byId(id);
  if (!section) {
    section = make("section", {id, "aria-labelledby": `${id}-title`});
    byId("routes").append(section);
  }
  fill(section,
    make("h2", {id: `${id}-title`}, `${route.name}: `, word(route.health)),
    ...reasons(route.health),
    make("p", {class: "dim"}, `${route.listen.join(", ")} · ${route.protocol} · ${route.pool_mode}`),
    make("div", {class: "tiles"}, ...tiles),
    ...latency(route, old, now.bounds),
    endpoints(route, old),
    discovery(route.discovery),
    ...lastEnds(route));
}

/** Of several routes, those in trouble: the one that matters may be far below. */
function routesInTrouble({routes}) {
  const inTrouble = [...routes.entries()].filter(([, {health}]) => health.word !== "fine");
  if (routes.length < 2 || !inTrouble.length) return [];
  const line = ([at, {name, health}]) => make("li", {}, make("a", {href: `#route-${at}`}, name),
    `: ${health.reasons.length ? health.reasons[0].words : health.word}`);
  return [make("ul", {class: "reasons"}, ...inTrouble.map(line))];
}

function showProcess() {
  const now = history[history.length - 1], then = before();
  document.title = `Aegis: ${overall(now).word}`;
  fill(byId("health"), word(overall(now)), ...reasons(now.health), ...routesInTrouble(now));
  fill(byId("about"), `${now.version} on ${now.arch}, up ${age(now.alive)}`);
  const levels = [level("sessions", now.sessions)];
  if (now.descriptors) levels.push(level("descriptors", now.descriptors));
  if (now.memory_bytes !== null) levels.push(level("memory", {now: now.memory_bytes, max: null}, bytes));
  if (now.cpu_seconds !== null) levels.push(tile("CPU, cores", cores, (a, b) => rate(a, b, (reading) => reading.cpu_seconds)));
  fill(byId("levels"), ...levels);
  const rows = now.workers.map((worker, at) => {
    const share = (read) => percent(rate(now, then, (reading) => read(reading.workers[at])));
    const turns = rate(now, then, (reading) => reading.workers[at].turns);
    const events = rate(now, then, (reading) => reading.workers[at].completions);
    return make("tr", {}, make("th", {scope: "row"}, String(at)), ...[
      worker.state, number(worker.sessions), share((w) => w.cpu_seconds), share((w) => w.core_wait_seconds),
      turns ? number(events / turns) : "–",
    ].map((cell) => make("td", {}, cell)));
  });
  fill(byId("workers").tBodies[0], ...rows);
  fill(byId("driver"), `I/O by ${now.driver.name} on Linux ${now.driver.kernel}: ${now.driver.why}`);
}

/** The worst of the process and its routes. */
function overall(now) {
  const order = ["fine", "degraded", "draining", "starting", "down", "stuck"];
  const all = [now.health, ...now.routes.map((route) => route.health)];
  return all.reduce((worst, one) => order.indexOf(one.word) > order.indexOf(worst.word) ? one : worst);
}

function show() {
  for (const at of history[history.length - 1].routes.keys()) showRoute(at);
  showProcess();
}

function heard(reading) {
  const latest = history[history.length - 1];
  // This page may not know what another version tells.
  if (latest && reading.version !== latest.version) return location.reload();
  // Counters of another process begin anew.
  const restarted = latest && reading.began !== latest.began;
  // One that was overtaken.
  if (latest && !restarted && reading.alive < latest.alive) return;
  if (restarted || (latest && reading.routes.length !== latest.routes.length)) {
    history = [];
    byId("routes").replaceChildren();
  }
  watchEnds(reading, history[history.length - 1]);
  history.push(reading);
  history = history.filter((one) => reading.alive - one.alive <= KEPT);
  // Only the readings of the last seconds are compared by endpoint.
  for (const one of history.filter((one) => reading.alive - one.alive > WINDOW + 2)) one.routes.forEach((route) => { route.endpoints = []; });
  lostSince = null;
  document.body.classList.remove("stale");
  byId("lost").hidden = true;
  show();
}

function lost(why) {
  lostSince = lostSince || Date.now();
  document.body.classList.add("stale");
  const banner = byId("lost");
  const since = new Date(lostSince).toLocaleTimeString("en-GB");
  fill(banner, `The proxy has not answered since ${since} (${why}). What is below is old; this page goes on asking.`);
  banner.hidden = false;
  document.title = "Aegis: lost";
}

async function read() {
  const answer = await fetch("status", {cache: "no-store", signal: AbortSignal.timeout(TIMEOUT)});
  if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
  return answer.json();
}

let next = null;

async function ask() {
  next = setTimeout(ask, document.hidden ? EVERY * 5 : EVERY);
  const why = (error) => error.name === "TimeoutError" ? `no answer in time` : error.message;
  try {
    heard(await read());
  } catch (error) {
    lost(why(error));
  }
}

// Nobody shall look at what was read while nobody looked.
document.addEventListener("visibilitychange", () => {
  clearTimeout(next);
  if (document.hidden) next = setTimeout(ask, EVERY * 5);
  else ask();
});
ask();
