
"use strict";
// Draws what GET vcpus/stream sends: for each vCPU the modes of each interval, stacked; the bounds of its guest time; its exits;
// and the same figures in tables. Paths are relative, so that the page works behind a proxy's prefix too.
//
// Totals are BigInt, for nanoseconds pass 2^53 after 104 days, and a sum that is off by one is no sum. What is drawn are
// differences of totals, which fit a Number: nothing is lost between two readings, however far apart they are.
// What comes from the API becomes text, never markup.

const MODES = ["guest", "host_user", "host_kernel", "halted", "waiting", "blocked", "paused"];
const COLUMNS = 120; // intervals that a picture shows
const RETRY_MS = 2000;
const SVG = "http://www.w3.org/2000/svg";

const $ = id => document.getElementById(id);
const text = (node, value) => { if (node.textContent !== value) node.textContent = value; };

function svg(parent, name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return parent.appendChild(node);
}

/* Figures */

// JSON whose integers become BigInt. Strings are matched as a whole, so that no digit inside of one is taken for a number.
function parse(json) {
  const marked = json.replace(/"(?:[^"\\]|\\.)*"|-?\d+/g, part => part.startsWith('"') ? part : `{"int":"${part}"}`);
  return JSON.parse(marked, (_, value) => typeof value?.int === "string" ? BigInt(value.int) : value);
}

// Seconds, all nine decimals of them.
const seconds = ns => `${ns / 1_000_000_000n}.${String(ns % 1_000_000_000n).padStart(9, "0")}`;

// A length of time: to three digits, or in its two largest units.
function span(ns) {
  for (const [unit, size] of [["ns", 1], ["µs", 1e3], ["ms", 1e6], ["s", 1e9]]) {
    if (ns < size * 999.5) return `${Number((ns / size).toPrecision(3))} ${unit}`;
  }
  let rest = Math.round(ns / 1e9);
  const parts = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]].map(([unit, size]) => {
    const whole = Math.floor(rest / size);
    rest -= whole * size;
    return whole ? `${whole} ${unit}` : "";
  });
  const first = parts.findIndex(Boolean);
  return parts.slice(first, first + 2).join(" ").trim();
}

const percent = share => (share * 100).toFixed(1);
const number = value => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });

/* One vCPU */

class Vcpu {
  constructor(index) {
    this.node = $("vcpu").content.firstElementChild.cloneNode(true);
    this.find = selector => this.node.querySelector(selector);
    this.node.id = `vcpu-${index}`;
    const heading = this.find("h2");
    heading.id = `vcpu-${index}-name`;
    heading.textContent = `vCPU ${index}`;
    this.node.setAttribute("aria-labelledby", heading.id);

    this.rows = MODES.map(mode => {
      const row = this.row(".modes tbody", mode, 2);
      const swatch = document.createElementNS(SVG, "svg");
      swatch.setAttribute("class", "swatch");
      swatch.setAttribute("aria-hidden", "true");
      svg(swatch, "rect", { width: "100%", height: "100%", class: mode });
      row.firstChild.prepend(swatch);
      return row;
    });
    this.exits = new Map();

    this.time = this.find("svg.time");
    svg(this.time, "path", { class: "grid" });
    this.areas = MODES.map(mode => svg(this.time, "path", { class: mode }));
    this.time.append(this.time.firstChild); // the grid goes over the areas
    this.band = this.find("svg.band");
    this.between = svg(this.band, "path", {});
    this.zero = svg(this.band, "line", { class: "zero" });
    this.edges = [svg(this.band, "text", { x: 4 }), svg(this.band, "text", { x: 4 })];

    const row = $("overview-row").content.firstElementChild.cloneNode(true);
    row.querySelector("a").href = `#${this.node.id}`;
    row.querySelector("a").textContent = `vCPU ${index}`;
    this.overview = row;
    this.pieces = MODES.map(mode => svg(row.querySelector("svg"), "rect", { class: mode, height: "100%" }));
    this.last = this.before = this.shares = null;
    this.samples = [];
  }

  // A row of a table of this vCPU's: its head, and so many cells.
  row(body, name, cells) {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.append(name);
    row.append(head, ...Array.from({ length: cells }, () => document.createElement("td")));
    row.dataset.name = name;
    this.find(body).append(row);
    return row;
  }

  // Whether a reading is of another microVM's, which answers at the same address: its totals have nothing to do with these.
  is_other({ tid, elapsed_ns }) {
    return tid !== this.last.tid || elapsed_ns < this.last.elapsed_ns;
  }

  take(reading) {
    const before = this.last;
    if (before?.elapsed_ns === reading.elapsed_ns) return;
    [this.before, this.last] = [before, reading];
    if (before) {
      const elapsed = Number(reading.elapsed_ns - before.elapsed_ns);
      this.shares = MODES.map(mode => Number(reading.modes[`${mode}_ns`] - before.modes[`${mode}_ns`]) / elapsed);
    }
    const { lower, upper } = reading.gtime_bounds_ns;
    this.samples.push({
      at: reading.at_ns, from: before?.at_ns, shares: this.shares,
      below: Number(reading.gtime_ns - lower), above: Number(upper - reading.gtime_ns),
    });
    while (this.samples.length > 10 * COLUMNS) this.samples.shift();
  }

  draw(window_ns) {
    const r = this.last;
    const busy = r.state === "exited" ? "" : ` for ${span(Number(r.pending.delta_ns))} so far`;
    this.facts(".state", [`${r.state}${busy}`, `guest time by ${r.source}`]);
    const { cpu, pinned, nohz_full, isolated, tick_stopped } = r.host_cpu;
    const tick = tick_stopped === null ? "tick: not known" : tick_stopped ? "tick stopped" : "tick running";
    this.facts(".host", [`host CPU ${cpu}`, pinned && "pinned", nohz_full && "nohz_full", isolated && "isolated",
      nohz_full && tick_stopped === false ? `\u26A0 ${tick}, though nohz_full` : tick]);

    const figures = MODES.map(mode => r.modes[`${mode}_ns`]);
    this.rows.forEach((row, i) => this.cells(row, figures[i], this.shares?.[i]));
    this.cells(this.find(".sum"), figures.reduce((a, b) => a + b), this.shares?.reduce((a, b) => a + b));
    this.cells(this.find(".elapsed"), r.elapsed_ns);
    this.cells(this.find(".lower"), r.gtime_bounds_ns.lower);
    this.cells(this.find(".upper"), r.gtime_bounds_ns.upper);
    this.cells(this.find(".utime"), r.utime_ns);
    this.cells(this.find(".stime"), r.stime_ns);
    this.drawExits();
    this.drawTime(window_ns);
    this.drawBand(window_ns);

    const [state, guest, host] = this.overview.querySelectorAll("td");
    text(state, r.state);
    text(guest, this.shares ? percent(this.shares[0]) : "–");
    text(host, String(cpu));
    let from = 0;
    this.pieces.forEach((piece, i) => {
      const share = this.shares?.[i] ?? 0;
      piece.setAttribute("x", `${from * 100}%`);
      piece.setAttribute("width", `${share * 100}%`);
      from += share;
    });
  }

  facts(selector, facts) {
    const line = this.find(selector);
    facts = facts.filter(Boolean);
    while (line.children.length > facts.length) line.lastChild.remove();
    facts.forEach((fact, i) => {
      const node = line.children[i] ?? line.appendChild(document.createElement("span"));
      text(node, fact);
      node.classList.toggle("alarm", fact.startsWith("\u26A0"));
    });
  }

  // A total in seconds, and in nanoseconds for whoever reads the page by program; and what share it was just now.
  cells(row, ns, share) {
    const [total, now] = row.querySelectorAll("td");
    text(total, seconds(ns));
    total.dataset.ns = ns;
    if (now) text(now, share === undefined ? "" : percent(share));
  }

  drawExits() {
    const now = this.last.exits, before = this.before?.exits;
    const elapsed_s = this.before ? Number(this.last.elapsed_ns - this.before.elapsed_ns) / 1e9 : 0;
    const none = { count: 0n, vmm_ns: 0n };
    const lines = Object.entries(now.by_reason).map(([name, is]) => {
      if (!this.exits.has(name)) this.exits.set(name, this.row(".exits tbody", name, 3));
      const was = before?.by_reason[name] ?? none;
      const count = Number(is.count - was.count);
      return { name, total: is.count, count, rate: count / elapsed_s, each_ns: Number(is.vmm_ns - was.vmm_ns) / count };
    });
    const most = Math.max(...lines.map(line => line.count), 1);
    for (const { name, total, count, rate, each_ns } of lines) {
      const [rated, each, all] = this.exits.get(name).querySelectorAll("td");
      text(rated, before ? number(rate) : "–");
      rated.className = "rate";
      rated.style.setProperty("--part", before ? count / most * 100 : 0);
      text(each, before && count ? span(each_ns) : "–");
      text(all, total.toLocaleString("en"));
      all.dataset.count = total;
    }
    for (const [name, row] of this.exits) if (!(name in now.by_reason)) { row.remove(); this.exits.delete(name); }
    const [rated, , all] = this.find(".exits tfoot").querySelectorAll("td");
    text(rated, before ? number(Number(now.total - before.total) / elapsed_s) : "–");
    text(all, now.total.toLocaleString("en"));
    all.dataset.count = now.total;
  }

  // What is in the picture, with its place from left to right in pixels.
  visible(window_ns, width) {
    const end = this.last.at_ns;
    const place = at => Math.max(0, (1 - Number(end - at) / window_ns) * width);
    return this.samples.filter(({ at }) => Number(end - at) < window_ns)
      .map(sample => ({ ...sample, x: place(sample.at), x0: place(sample.from ?? sample.at) }));
  }

  drawTime(window_ns) {
    const { clientWidth: width, clientHeight: height } = this.time;
    const columns = this.visible(window_ns, width).filter(({ shares }) => shares);
    const floors = columns.map(() => height);
    MODES.forEach((_, mode) => {
      let there = "", back = "";
      columns.forEach(({ x, x0, shares }, i) => {
        const floor = floors[i];
        floors[i] = floor - shares[mode] * height;
        there += `${i ? "L" : "M"}${x0.toFixed(1)} ${floors[i].toFixed(2)}H${x.toFixed(1)}`;
        back = `L${x.toFixed(1)} ${floor.toFixed(2)}H${x0.toFixed(1)}${back}`;
      });
      // Without a line around it, a mode that took no time would not be there at all.
      const none = columns.every(({ shares }) => shares[mode] === 0);
      this.areas[mode].setAttribute("d", none ? "" : `${there}${back}Z`);
    });
    this.time.lastChild.setAttribute("d", [.25, .5, .75].map(y => `M0 ${y * height}H${width}`).join(""));
    this.time.dataset.columns = columns.length;
    this.axis(window_ns);
  }

  drawBand(window_ns) {
    const { clientWidth: width, clientHeight: height } = this.band;
    const points = this.visible(window_ns, width);
    const above = Math.max(...points.map(p => p.above)), below = Math.max(...points.map(p => p.below));
    // The figure itself is the line in the middle of it all; a bound on the line leaves no room on its side.
    const scale = (height - 4) / Math.max(above + below, 1), zero = 2 + above * scale;
    const edge = (points, y) => points.map(p => `${p.x.toFixed(1)} ${y(p).toFixed(1)}`).join("L");
    this.between.setAttribute("d",
      `M${edge(points, p => zero - p.above * scale)}L${edge(points.toReversed(), p => zero + p.below * scale)}Z`);
    for (const [key, value] of Object.entries({ x1: 0, x2: width, y1: zero, y2: zero })) this.zero.setAttribute(key, value);
    const { above: up, below: down } = this.samples.at(-1);
    text(this.edges[0], `at most ${span(up)} more`);
    text(this.edges[1], this.last.gtime_bounds_ns.lower ? `at most ${span(down)} less` : "no lower bound is proved");
    this.edges[0].setAttribute("y", 16);
    this.edges[1].setAttribute("y", height - 6);
  }

  axis(window_ns) {
    for (const axis of this.node.querySelectorAll(".axis")) text(axis.firstChild, `${span(window_ns)} ago`);
  }
}

/* The connection */

const vcpus = [];
let stream = null, heard = 0, retry = 0, held = false, drawn = false;

const interval_ms = () => Number($("interval").value);

function say(what, kind) {
  text($("status"), what);
  $("status").className = kind;
  document.body.classList.toggle("stale", kind === "lost");
}

// What the server answers when it refuses.
class Refused extends Error {}

async function ask(path, signal) {
  const response = await fetch(path, { signal, cache: "no-store" });
  if (!response.ok) throw new Refused((await response.json()).fault_message);
  return response;
}

// Follows the stream to its end. Not by EventSource, which does not tell why it was refused.
async function follow(signal) {
  const response = await ask(`vcpus/stream?interval_ms=${interval_ms()}`, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = /^event: reading\ndata: (.*)$/.exec(event);
      if (data) take(parse(data[1]));
    }
  }
}

async function connect() {
  disconnect();
  if (held || document.hidden) return;
  heard = Date.now();
  const mine = stream = new AbortController();
  look();
  const error = await follow(mine.signal).catch(error => error);
  if (stream === mine) lost(error);
}

function disconnect() {
  clearTimeout(retry);
  stream?.abort();
  stream = null;
}

function lost(error) {
  disconnect();
  retry = setTimeout(connect, RETRY_MS);
  const why = error instanceof Refused ? error.message : "The microVM has ended, or its API cannot be reached.";
  const last = vcpus.length ? ` These are the last figures, of ${new Date(heard).toLocaleTimeString()}.` : "";
  say(`Connection lost. ${why}${last} Trying again every ${RETRY_MS / 1000} s.`, "lost");
}

// Who answers, and why there are no readings where there are none: there are none before the guest's start, nor where a
// connection hangs.
async function look() {
  const asked = stream;
  try {
    const info = await (await ask("./", AbortSignal.timeout(5000))).json();
    text($("vm"), info.id);
    document.title = `${info.id} – Chronovisor`;
    if (stream === asked && info.state === "Not started") {
      vcpus.splice(0);
      arrange();
      say("Not started yet: there are no vCPUs to read. Waiting for the guest's start.", "waiting");
      heard = Date.now();
    }
  } catch (error) {
    if (stream === asked) lost(error);
  }
}

setInterval(() => {
  if (stream && Date.now() - heard > Math.max(2 * interval_ms(), 2000)) look();
}, 1000);

function take(reading) {
  heard = Date.now();
  const index = Number(reading.index);
  if (vcpus[index]?.is_other(reading)) vcpus.splice(0);
  if (!vcpus[index]) {
    vcpus[index] = new Vcpu(index);
    arrange();
  }
  vcpus[index].take(reading);
  const every = `A reading every ${span(interval_ms() * 1e6)}.`;
  const all = state => vcpus.every(vcpu => vcpu.last.state === state);
  if (all("paused")) say(`Paused by request: every vCPU is held. ${every}`, "live");
  else if (all("exited")) say("The guest has ended: its vCPUs' figures stand still.", "live");
  else say(`Live. ${every}`, "live");
  changed();
}

// The vCPUs on the page are those that are read.
function arrange() {
  $("vcpus").replaceChildren(...vcpus.filter(Boolean).map(vcpu => vcpu.node));
  $("overview").querySelector("tbody").replaceChildren(...vcpus.filter(Boolean).map(vcpu => vcpu.overview));
  $("overview").hidden = vcpus.length < 2;
}

function changed() {
  if (drawn) return;
  drawn = true;
  requestAnimationFrame(() => {
    drawn = false;
    const window_ns = COLUMNS * interval_ms() * 1e6;
    for (const vcpu of vcpus) vcpu?.draw(window_ns);
  });
}

$("interval").addEventListener("change", () => { connect(); changed(); });
$("hold").addEventListener("click", () => {
  held = !held;
  $("hold").setAttribute("aria-pressed", held);
  if (held) say("Held by you: the figures stand still, and nothing is read.", "held");
  connect();
});
// A page that nobody looks at reads nothing, and loses nothing by it.
document.addEventListener("visibilitychange", connect);
addEventListener("resize", changed);
if (matchMedia("(prefers-reduced-motion: reduce)").matches) $("interval").value = "2000";
$("interval").form.addEventListener("submit", event => event.preventDefault());
connect();
