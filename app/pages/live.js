"use strict";
// The office's live page: one stream a second, drawn by hand. The key stays in sessionStorage: this tab, this session.
const KEY = "fairdrop.operator_key";
const RETRY_MS = 2000; // between two tries to connect again
const SPARK_POINTS = 90; // seconds of history behind each rate
const $ = (id) => document.getElementById(id);
const sale = (location.pathname.match(/^\/live\/([a-z0-9][a-z0-9-]{0,47})$/) || [])[1];
const seen = { join_per_s: [], serve_per_s: [], reserve_per_s: [], pay_per_s: [] };
const number = new Intl.NumberFormat();
const rate = new Intl.NumberFormat(undefined, { maximumFractionDigits: 1 });
let last = null;
let clockOffset = 0;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function show(name) {
  for (const id of ["sign-in", "list", "live"]) $(id).hidden = id !== name;
  $("sign-out").hidden = name === "sign-in";
}

async function call(path, options = {}) {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem(KEY) || ""}`, ...options.headers };
  return fetch(path, { ...options, headers, cache: "no-store" });
}

function signIn(problem) {
  sessionStorage.removeItem(KEY);
  $("key-problem").textContent = problem || "";
  show("sign-in");
  $("key").focus();
}

// ---- the list
async function list() {
  const answer = await call("/v1/admin/sales?limit=100");
  if (answer.status === 401) return signIn("This key is unknown or has been revoked.");
  if (!answer.ok) throw new Error(`the office answers ${answer.status}`);
  const rows = (await answer.json()).data;
  $("no-sales").hidden = rows.length > 0;
  $("sales").replaceChildren(...rows.map((row) => {
    const item = make("li", "card");
    const link = make(row.state === "draft" ? "div" : "a");
    if (row.state !== "draft") link.href = `/live/${row.id}`;
    const units = row.items.reduce((sum, one) => sum + one.units, 0);
    const sold = row.items.reduce((sum, one) => sum + one.sold + one.reserved, 0);
    const head = make("p", "row");
    head.append(make("strong", "", row.title), pill(row.state));
    link.append(head, make("p", "quiet", row.id), make("p", "quiet num", `opens ${new Date(row.opens_at).toLocaleString()}`),
      make("p", "num", `${number.format(sold)} of ${number.format(units)} units taken`));
    item.append(link);
    return item;
  }));
  show("list");
  await bills();
}

// ---- suppliers' daily bills: the last ones, and each line that differs below its day
const BILLS_SHOWN = 10;

async function bills() {
  const answer = await call(`/v1/admin/bills?limit=${BILLS_SHOWN}`);
  if (!answer.ok) return;
  const rows = (await answer.json()).data;
  const differ = rows.reduce((sum, row) => sum + row.differing, 0);
  $("bills-card").hidden = rows.length === 0;
  $("bills-word").textContent = differ ? `${number.format(differ)} differ` : "all agree";
  $("bills-word").className = `pill ${differ ? "wrong" : "good"}`;
  $("bills").replaceChildren(...rows.flatMap((row) => {
    const head = make("tr", row.differing ? "broken" : "");
    const said = row.state === "read" ? `read ${new Date(row.read_at).toLocaleString()}` : row.code ? `not read: ${row.code}` : "not read yet";
    head.append(make("td", "num", row.day), make("td", "", row.provider), make("td", "right", row.lines === null ? "–" : number.format(row.lines)),
      make("td", "right", number.format(row.differing)), make("td", "quiet", said));
    return [head, ...row.differences.map((one) => {
      const line = make("tr", "quiet");
      const cell = make("td", "", `${one.what} ${one.kind.replace("_", " ")}: order ${one.order_no}, ours ${one.ours_minor ?? "–"}, theirs ${one.theirs_minor ?? "–"} ${one.currency} minor (${one.ref || one.our_id})`);
      cell.colSpan = 5;
      line.append(cell);
      return line;
    })];
  }));
}

function pill(word) {
  const look = word === "open" ? "good" : ["paused", "draft"].includes(word) ? "warn" : "";
  return make("span", `pill ${look}`, word.replace("_", " "));
}

// ---- one sale
function draw(doc) {
  last = doc;
  clockOffset = Date.parse(doc.now_at) - Date.now();
  document.title = `${number.format(doc.units_left)} left · ${doc.title}`;
  $("title").textContent = doc.title;
  $("state").textContent = doc.state.replace("_", " ");
  $("state").className = `pill ${doc.state === "open" ? "good" : doc.state === "paused" ? "warn" : ""}`;
  $("message").hidden = !doc.message;
  $("message").textContent = doc.message || "";
  $("pause").hidden = !["scheduled", "line_open", "open", "sold_out"].includes(doc.state);
  $("resume").hidden = doc.state !== "paused";
  $("units-left").textContent = number.format(doc.units_left);
  $("units-of").textContent = `of ${number.format(doc.units)}`;
  $("waiting").textContent = number.format(doc.waiting);
  $("joined").textContent = `${number.format(doc.joined)} joined`;
  $("reserved").textContent = number.format(doc.reserved);
  $("claimed").textContent = `${number.format(doc.claimed)} being written`;
  $("paid").textContent = number.format(doc.paid);
  const ended = [["expired", doc.expired], ["cancelled", doc.cancelled], ["refunded", doc.refunded + doc.refunding]];
  $("ended").textContent = ended.filter((one) => one[1]).map((one) => `${number.format(one[1])} ${one[0]}`).join(" · ") || "none ended";
  stock(doc);
  funnel(doc);
  rates(doc);
  waits(doc);
  breakers(doc.providers);
  audit(doc.invariants);
  show("live");
}

function stock(doc) {
  $("stock").replaceChildren(...doc.items.flatMap((item) => {
    const flying = Math.max(0, item.units - item.units_left - item.reserved - item.sold);
    const head = make("div", "row");
    head.append(make("strong", "", `${item.title} (${item.sku})${item.paused ? " — stopped" : ""}`),
      make("span", "quiet num", `${number.format(item.units_left)} of ${number.format(item.units)} left · ${number.format(item.waiting)} in line`));
    const bar = make("div", "bar");
    for (const [name, units] of [["sold", item.sold], ["held", item.reserved], ["fly", flying]]) {
      const part = make("i", name);
      part.style.width = `${item.units ? (100 * units) / item.units : 0}%`;
      bar.append(part);
    }
    return [head, bar];
  }));
}

function funnel(doc) {
  const ever = doc.reserved + doc.paid + doc.expired + doc.cancelled + doc.refunded + doc.refunding;
  const steps = [["joined", doc.joined], ["served by the line", doc.served], ["orders", ever], ["paid", doc.paid + doc.refunding + doc.refunded]];
  const most = Math.max(1, ...steps.map((one) => one[1]));
  $("funnel").replaceChildren(...steps.flatMap(([name, count], at) => {
    const row = make("div", "row");
    const share = at && steps[at - 1][1] ? ` · ${rate.format((100 * count) / steps[at - 1][1])} %` : "";
    row.append(make("span", "", name), make("strong", "num", number.format(count) + share));
    const track = make("div", "track");
    const fill = make("div", "fill");
    fill.style.width = `${(100 * count) / most}%`;
    track.append(fill);
    return [row, track];
  }));
}

function rates(doc) {
  const names = { join_per_s: "joins", serve_per_s: "served", reserve_per_s: "reserved", pay_per_s: "paid" };
  $("rates").replaceChildren(...Object.entries(names).map(([field, name]) => {
    const points = seen[field];
    points.push(doc.rates[field] || 0);
    if (points.length > SPARK_POINTS) points.shift();
    const row = make("div", "spark");
    const most = Math.max(1, ...points);
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    svg.setAttribute("viewBox", `0 0 ${SPARK_POINTS - 1} 30`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    const path = document.createElementNS(space, "path");
    const first = SPARK_POINTS - points.length;
    path.setAttribute("d", points.map((value, at) => `${at ? "L" : "M"}${first + at} ${(28 - (26 * value) / most).toFixed(1)}`).join(""));
    svg.append(path);
    row.append(make("span", "quiet", name), svg, make("strong", "right", doc.rates[field] === null ? "–" : rate.format(doc.rates[field])));
    return row;
  }), make("p", "quiet num", doc.rates.limit_per_s === null ? "admission: as fast as stock allows" : `admission: ${rate.format(doc.rates.limit_per_s)} tickets per second`),
  doc.slowdown ? make("p", "quiet num", `slowed down to ${rate.format(doc.slowdown.rate_per_s)} per second: ${doc.slowdown.reason.replace("_", " ")}`) : make("p", "quiet", doc.notices.map(word => `${word} is out of order`).join(", ")));
}

function waits(doc) {
  const ms = (value) => (value === null ? "–" : value < 1000 ? `${Math.round(value)} ms` : `${rate.format(value / 1000)} s`);
  const facts = [
    ["claim → reserved, half", ms(doc.latency.confirm_p50_ms)], ["claim → reserved, 99 %", ms(doc.latency.confirm_p99_ms)],
    ["reserved → paid, half", ms(doc.latency.pay_p50_ms)], ["reserved → paid, 99 %", ms(doc.latency.pay_p99_ms)],
    ["claims for Postgres", number.format(doc.backlog.orders)], ["requests of buyers", number.format(doc.backlog.asks)],
    ["decisions for Redis", number.format(doc.backlog.outbox)], ["SMS sent", number.format(doc.sms.sent)],
  ];
  $("waits").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", "", name), make("dd", "", value)]));
}

function breakers(providers) {
  $("breakers").replaceChildren(...providers.map((one) => {
    const row = make("li");
    const word = make("span", `pill ${one.state === "closed" ? "good" : ["open", "forced_open"].includes(one.state) ? "wrong" : "warn"}`, one.state.replace("_", " "));
    const name = make("span", "", one.kind ? `${one.name} · ${one.kind}` : one.name);
    row.append(name, word);
    if (one.calls !== undefined) row.append(make("small", "quiet num", `${number.format(one.calls)} calls, ${number.format(one.failures)} failed, ${number.format(one.slow)} slow · ${one.mode}`));
    return row;
  }));
}

function audit(found) {
  $("audit-word").textContent = found ? (found.ok ? "all agree" : "does not hold") : "not looked at yet";
  $("audit-word").className = `pill ${found ? (found.ok ? "good" : "wrong") : ""}`;
  const checks = found ? [...found.checks].sort((a, b) => a.ok - b.ok) : [];
  $("audit").replaceChildren(...checks.map((check) => {
    const row = make("tr", check.ok ? "" : "broken");
    row.append(make("td", "", check.name.replaceAll("_", " ")), make("td", "right", number.format(check.left)),
      make("td", "right", number.format(check.right)), make("td", "", check.ok ? "✓" : "✗"));
    return row;
  }));
}

function tick() {
  if (!last) return;
  const now = Date.now() + clockOffset;
  const next = [["line opens", last.line_opens_at], ["opens", last.opens_at], ["closes", last.closes_at]].find((one) => Date.parse(one[1]) > now);
  if (!next || ["closed", "settled"].includes(last.state)) { $("clock").textContent = ""; return; }
  const left = Math.round((Date.parse(next[1]) - now) / 1000);
  const parts = [Math.floor(left / 3600), Math.floor(left / 60) % 60, left % 60].map((part) => String(part).padStart(2, "0"));
  $("clock").textContent = `${next[0]} in ${parts.join(":")}`;
}

async function watch() {
  for (;;) {
    try {
      const answer = await call(`/v1/admin/sales/${sale}/live/events`);
      if (answer.status === 401) return signIn("This key is unknown or has been revoked.");
      if (!answer.ok) {
        const problem = await answer.json().catch(() => ({}));
        $("net").textContent = problem.detail || `the office answers ${answer.status}`;
        if (answer.status === 404 || answer.status === 409) { // nothing to watch: not a page of empty figures
          $("net").textContent = answer.status === 404 ? `There is no sale ${sale}.` : `${sale} is a draft: there is nothing to watch yet.`;
          return list();
        }
      } else {
        await read(answer.body.getReader());
      }
    } catch (error) {
      $("net").textContent = "no connection, trying again";
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

async function read(reader) {
  const decoder = new TextDecoder();
  let buffered = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    buffered += decoder.decode(value, { stream: true });
    const events = buffered.split("\n\n");
    buffered = events.pop();
    for (const event of events) {
      const data = event.split("\n").find((line) => line.startsWith("data: "));
      if (data) { $("net").textContent = ""; draw(JSON.parse(data.slice(6))); }
      else if (event.startsWith(": ")) $("net").textContent = event.slice(2);
    }
  }
}

async function turn(action) {
  const headers = { "Idempotency-Key": crypto.getRandomValues(new Uint32Array(4)).join("-") };
  for (const id of ["pause", "resume"]) $(id).disabled = true;
  const answer = await call(`/v1/admin/sales/${sale}/${action}`, { method: "POST", headers }).catch(() => null);
  for (const id of ["pause", "resume"]) $(id).disabled = false;
  const problem = answer && answer.ok ? null : answer ? await answer.json().catch(() => ({})) : { detail: "no connection" };
  $("problem").hidden = !problem;
  $("problem").textContent = problem ? problem.detail || problem.code || "refused" : "";
}

function start() {
  if (!sessionStorage.getItem(KEY)) return signIn();
  if (sale) { watch(); setInterval(tick, 250); } else list().catch(() => { $("net").textContent = "no connection"; });
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  start();
});
$("sign-out").addEventListener("click", () => { sessionStorage.removeItem(KEY); location.assign("/"); });
$("pause").addEventListener("click", () => turn("pause"));
$("resume").addEventListener("click", () => turn("resume"));
start();
