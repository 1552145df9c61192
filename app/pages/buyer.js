// The buyer's page. No framework, no build step. It polls as the server tells it, keeps its ticket in localStorage, and
// on a bad network simply asks again: the ticket is the place, not the connection.
"use strict";

const WORDS = {
  en: {
    sales: "Sales", noSales: "There is no sale at the moment.", choose: "Choose", leave: "Leave the line", leaveOrder: "Give it back",
    draw: "How the draw works", phone: "Phone number for the result (optional)", units: "How many", join: "Join", joinDraw: "Join the draw", joining: "One moment…",
    again: "Join again", login: "Open this page from the shop's app to take part.", pay: "Pay", preparing: "The payment link is being made…",
    retryPay: "Get a new payment link", offline: "No connection, trying again…", busy: "Very busy, trying again…",
    lineOpensIn: "The line opens in", opensIn: "The sale starts in", isOpen: "The sale is open", isPaused: "Paused for a moment. Your place is kept.",
    isSoldOut: "Sold out", isClosed: "The sale is over", plenty: "in stock", few: "few left", none: "none left",
    waiting: "You are in the line", inDraw: "You are in the draw", drawHint: "Places are drawn at the opening. You may close this page.",
    ahead: n => n === 0 ? "You are next" : `${n} ahead of you`, eta: (a, b) => a === b ? `about ${a}` : `about ${a} to ${b}`,
    standby: "Waiting for a returned unit", claimed: "You got it! Your order is being written…", reserved: "It is yours. Please pay.",
    payBy: t => `Pay within ${t}`, paid: "Paid. Thank you!", sold_out: "Sold out before your turn. Sorry!", closed: "The sale ended before your turn.",
    left: "You left the line.", expired: "Not paid in time; the unit went to the next in line.", cancelled: "The order was cancelled.",
    refunded: "Your money is on its way back.", lapsed: "Your place was lost on our side. Please join again.", leaving: "Giving it back…",
    unknownPay: "The payment is being checked…", order: n => `Order ${n}`, solving: "Checking that you are not a robot…",
    captcha: "This sale asks for a captcha: open it from the shop's page.", s: "s", min: "min", h: "h", d: "d",
    keepOpen: "Your place is kept even if you close this page.", sure: "Really give up your place?",
  },
  zh: {
    sales: "抢购活动", noSales: "目前没有活动。", choose: "请选择", leave: "退出排队", leaveOrder: "放弃名额",
    draw: "抽签规则", phone: "接收结果的手机号（选填）", units: "数量", join: "立即抢购", joinDraw: "参加抽签", joining: "请稍候…",
    again: "重新排队", login: "请从商城打开本页面参加。", pay: "去支付", preparing: "正在生成支付链接…",
    retryPay: "重新获取支付链接", offline: "网络不稳定，正在重试…", busy: "人数较多，正在重试…",
    lineOpensIn: "距开始排队", opensIn: "距开抢", isOpen: "正在抢购", isPaused: "活动暂停，您的位置已保留。",
    isSoldOut: "已售罄", isClosed: "活动已结束", plenty: "有货", few: "即将售罄", none: "无货",
    waiting: "正在排队", inDraw: "您已参加抽签", drawHint: "开抢时抽签决定顺序，可以关闭本页面。",
    ahead: n => n === 0 ? "下一位就是您" : `前面还有 ${n} 人`, eta: (a, b) => a === b ? `预计 ${a}` : `预计 ${a} 至 ${b}`,
    standby: "候补中，等待释放的名额", claimed: "抢到了！正在生成订单…", reserved: "名额已为您保留，请尽快支付。",
    payBy: t => `请在 ${t} 内支付`, paid: "支付成功，谢谢！", sold_out: "很遗憾，轮到您之前已售罄。", closed: "轮到您之前活动已结束。",
    left: "您已退出排队。", expired: "超时未支付，名额已转给下一位。", cancelled: "订单已取消。",
    refunded: "退款处理中。", lapsed: "系统故障，您的位置已失效，请重新排队。", leaving: "正在释放名额…",
    unknownPay: "正在确认支付结果…", order: n => `订单号 ${n}`, solving: "正在进行安全验证…",
    captcha: "本活动需要人机验证，请从商城页面进入。", s: "秒", min: "分", h: "小时", d: "天",
    keepOpen: "关闭本页面也会保留您的位置。", sure: "确定放弃您的位置吗？",
  },
};
const zh = /^zh/i.test(navigator.language || "");
const T = zh ? WORDS.zh : WORDS.en;
document.documentElement.lang = zh ? "zh-CN" : "en";
const $ = id => document.getElementById(id);
const show = (id, on) => { $(id).hidden = !on; };
for (const element of document.querySelectorAll("[data-t]")) element.textContent = T[element.dataset.t];

const ENDED = new Set(["paid", "sold_out", "closed", "left", "expired", "cancelled", "refunded", "lapsed"]);
const store = {
  get(key) { try { return localStorage.getItem("fairdrop:" + key); } catch { return memory[key] || null; } },
  set(key, value) { memory[key] = value; try { localStorage.setItem("fairdrop:" + key, value); } catch { /* private mode */ } },
  drop(key) { delete memory[key]; try { localStorage.removeItem("fairdrop:" + key); } catch { /* private mode */ } },
};
const memory = {};

// --- who is the buyer: #pass=… or #token=… from the shop, a postMessage {type: "fairdrop", token | pass}, else (development) made here
const saleId = (/^\/s\/([a-z0-9-]+)$/.exec(location.pathname) || [])[1] || null;
let token = null;
let pass = saleId && store.get("pass:" + saleId);
{
  const given = new URLSearchParams(location.hash.slice(1));
  if (given.get("token")) token = given.get("token");
  if (given.get("pass") && saleId) { pass = given.get("pass"); store.set("pass:" + saleId, pass); }
  if (given.get("token") || given.get("pass")) history.replaceState(null, "", location.pathname); // not into history or screenshots
}
const SHOPS = [location.origin, ...(document.referrer ? [new URL(document.referrer).origin] : [])];
addEventListener("message", event => {
  if (!SHOPS.includes(event.origin) || !event.data || event.data.type !== "fairdrop") return;
  if (typeof event.data.token === "string") token = event.data.token;
  if (typeof event.data.pass === "string" && saleId) { pass = event.data.pass; store.set("pass:" + saleId, pass); }
  paint();
  wake();
});
function devBuyer() {
  let id = store.get("buyer");
  if (!id) { id = "web-" + Array.from(crypto.getRandomValues(new Uint8Array(9)), b => b.toString(36)).join("").slice(0, 14); store.set("buyer", id); }
  return id;
}
let development = null; // found out by asking once
function identity(withPass = true) {
  if (withPass && pass) return { Authorization: "Pass " + pass };
  if (token) return { Authorization: "Bearer " + token };
  return development === false ? {} : { "X-Buyer-Id": devBuyer() };
}

// --- asking the server
async function call(method, path, { body, auth } = {}) {
  const headers = { ...(auth || {}) };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const abort = new AbortController();
  const timer = setTimeout(() => abort.abort(), 10000);
  try {
    const answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), signal: abort.signal, cache: "no-store" });
    const text = await answer.text();
    let document_ = null;
    try { document_ = text ? JSON.parse(text) : null; } catch { document_ = null; }
    net(answer.status === 503 ? T.busy : "");
    return { status: answer.status, doc: document_, retryS: Number(answer.headers.get("Retry-After")) || 0 };
  } catch {
    net(T.offline);
    return { status: 0, doc: null, retryS: 0 };
  } finally {
    clearTimeout(timer);
  }
}
function net(text) { $("net").textContent = text; show("net", Boolean(text)); }
const sleep = ms => new Promise(done => { const timer = setTimeout(done, ms); sleepers.add(() => { clearTimeout(timer); done(); }); });
const sleepers = new Set();
function wake() { for (const up of sleepers) up(); sleepers.clear(); }
addEventListener("online", wake);
document.addEventListener("visibilitychange", () => { if (!document.hidden) wake(); });
let failures = 0;
const backoff = retryS => { failures = Math.min(failures + 1, 6); return (retryS * 1000 || Math.min(15000, 500 * 2 ** failures)) * (0.7 + Math.random() * 0.6); };

// --- the sale clock: the server's, not the phone's
let offset = 0;
const now = () => Date.now() + offset;
function learn(ms) { if (typeof ms === "number") offset = ms - Date.now(); }
function span(seconds) {
  seconds = Math.max(0, Math.ceil(seconds));
  const d = Math.floor(seconds / 86400), h = Math.floor(seconds / 3600) % 24, m = Math.floor(seconds / 60) % 60, s = seconds % 60;
  if (d) return `${d} ${T.d} ${h} ${T.h}`;
  if (h) return `${h} ${T.h} ${m} ${T.min}`;
  if (m) return `${m} ${T.min} ${s} ${T.s}`;
  return `${s} ${T.s}`;
}
function digits(seconds) {
  seconds = Math.max(0, Math.ceil(seconds));
  const d = Math.floor(seconds / 86400), two = n => String(n).padStart(2, "0");
  const rest = [Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60, seconds % 60].map(two).join(":");
  return d ? `${d} ${T.d} ${rest}` : rest;
}
function money(item) {
  if (item.price_minor === null || !item.currency) return "";
  try {
    const format = new Intl.NumberFormat(navigator.language, { style: "currency", currency: item.currency });
    return format.format(item.price_minor / 10 ** format.resolvedOptions().maximumFractionDigits);
  } catch { return `${item.price_minor} ${item.currency}`; }
}

// --- one sale
let sale = null, ticket = null, busy = false, trouble = "", seenAhead = Infinity;
function sku() { const box = document.querySelector("input[name=sku]:checked"); return box ? box.value : sale && sale.items[0].sku; }
function keep(doc) {
  if (!doc || !doc.ticket) return;
  if (!ticket || ticket.ticket !== doc.ticket) seenAhead = Infinity;
  learn(doc.now_ms);
  ticket = doc;
  store.set("ticket:" + saleId, doc.ticket);
}
function phase() {
  if (!sale) return "unknown";
  if (["closed", "paused", "sold_out"].includes(sale.state)) return sale.state;
  if (now() < Date.parse(sale.line_opens_at)) return "scheduled";
  return now() < Date.parse(sale.opens_at) ? "line_open" : "open";
}
function paint() {
  if (!sale) return;
  document.title = sale.title;
  $("title").textContent = sale.title;
  const said = [sale.message, ticket && ticket.message !== sale.message && ticket.message].filter(Boolean).join("\n");
  $("message").textContent = said; // the shop's words to everyone, and an SMS that no channel took
  show("message", Boolean(said));
  const at = phase();
  $("state").textContent = { scheduled: T.lineOpensIn, line_open: T.opensIn, open: T.isOpen, paused: T.isPaused, sold_out: T.isSoldOut, closed: T.isClosed }[at] || "";
  const to = at === "scheduled" ? sale.line_opens_at : at === "line_open" ? sale.opens_at : null;
  $("clock").textContent = to ? digits((Date.parse(to) - now()) / 1000) : "";
  paintItems();
  paintTicket();
  const live = ticket && !ENDED.has(ticket.state);
  const mayAgain = ticket && ["left", "expired", "cancelled", "lapsed"].includes(ticket.state);
  const joinable = ["line_open", "open", "paused"].includes(at);
  const known = Boolean(pass || token || development !== false);
  show("go", !live && at !== "closed" && !(ticket && ticket.state === "paid"));
  $("go").textContent = busy ? T.joining : mayAgain ? T.again : at === "line_open" || at === "scheduled" ? T.joinDraw : at === "sold_out" ? T.isSoldOut : T.join;
  $("go").disabled = busy || !joinable || !known;
  show("who", !live && !pass && known && joinable && !(ticket && ticket.state === "paid"));
  show("leave", Boolean(live) && !ticket.leaving);
  $("leave").textContent = ticket && ticket.state !== "waiting" ? T.leaveOrder : T.leave;
  const payment = ticket && ticket.payment;
  const url = ticket && ticket.state === "reserved" && payment && payment.state === "ready" && /^https?:/.test(payment.url || "") ? payment.url : null;
  show("pay", Boolean(url));
  if (url) { $("pay").href = url; $("pay").textContent = T.pay; }
  if (ticket && ticket.state === "reserved" && !url && !ticket.leaving && !(payment && ["starting", "unknown", "paid"].includes(payment.state))) {
    show("go", true); $("go").disabled = busy; $("go").textContent = payment && payment.state === "failed" ? T.retryPay : T.pay;
  }
  $("problem").textContent = known ? trouble : T.login;
  show("problem", Boolean($("problem").textContent));
  $("draw").href = `/v1/sales/${sale.id}/draw`;
}
function paintItems() {
  const box = $("items"), key = JSON.stringify(sale.items);
  if (box.dataset.key !== key) {
    const chosen = sku();
    for (const old of box.querySelectorAll(".item")) old.remove();
    sale.items.forEach((item, index) => {
      const label = document.createElement("label"), radio = document.createElement("input"), name = document.createElement("span"), left = document.createElement("small");
      label.className = "item"; radio.type = "radio"; radio.name = "sku"; radio.value = item.sku;
      radio.checked = chosen ? chosen === item.sku : index === 0;
      name.textContent = `${item.title} ${money(item)}`; left.textContent = T[item.availability] || "";
      label.append(radio, name, left); box.append(label);
    });
    box.dataset.key = key;
  }
  const units = $("units");
  if (units.length !== sale.limit_per_buyer) units.replaceChildren(...Array.from({ length: sale.limit_per_buyer }, (_, at) => new Option(at + 1)));
  show("many", sale.limit_per_buyer > 1);
  box.disabled = units.disabled = Boolean(ticket && !ENDED.has(ticket.state));
  if (box.disabled) units.value = ticket.units;
  for (const radio of box.querySelectorAll("input")) if (ticket && radio.value === ticket.sku && box.disabled) radio.checked = true;
}
function paintTicket() {
  show("place", Boolean(ticket));
  if (!ticket) return;
  const t = ticket, waiting = t.state === "waiting", payment = t.payment;
  $("word").textContent = t.leaving ? T.leaving : waiting ? (t.standby ? T.standby : t.rank === null ? T.inDraw : T.waiting) : T[t.state] || t.state;
  if (waiting && t.ahead !== null) seenAhead = Math.min(seenAhead, t.ahead); // a place never gets worse
  $("ahead").textContent = waiting && t.ahead !== null ? T.ahead(seenAhead) : "";
  $("eta").textContent = waiting && t.eta_s ? T.eta(span(t.eta_s.p50), span(t.eta_s.p90)) : "";
  $("hint").textContent = waiting ? (t.rank === null ? T.drawHint : T.keepOpen) : t.state === "reserved" && payment && payment.state === "starting" ? T.preparing : payment && payment.state === "unknown" ? T.unknownPay : "";
  if (t.notice) $("hint").textContent = t.notice.text[zh ? "zh-CN" : "en"] || t.notice.text.en || "";
  $("deadline").textContent = t.state === "reserved" && t.order && t.order.pay_by ? T.payBy(span((Date.parse(t.order.pay_by) - now()) / 1000)) : "";
  $("order").textContent = t.order ? T.order(t.order.order_no) : "";
}

// --- what the one button does
async function solve(challenge) { // proof of work: SHA-256("token:nonce") with leading zero bits, in slices so that the page stays alive
  const { token: riddle, bits } = challenge.params, text = new TextEncoder();
  for (let nonce = 0; ; nonce += 256) {
    const batch = await Promise.all(Array.from({ length: 256 }, (_, at) => crypto.subtle.digest("SHA-256", text.encode(`${riddle}:${nonce + at}`))));
    for (let at = 0; at < batch.length; at++) {
      const bytes = new Uint8Array(batch[at]);
      let zero = 0;
      for (const byte of bytes) { if (byte) { zero += Math.clz32(byte) - 24; break; } zero += 8; }
      if (zero >= bits) return { token: riddle, nonce: String(nonce + at) };
    }
  }
}
async function getPass() {
  const phone = $("phone").value.replace(/[\s()-]/g, "");
  const wish = { source: "page" };
  if (/^\+[1-9]\d{6,14}$/.test(phone)) wish.contact = { phone, language: zh ? "zh-CN" : "en" };
  for (let tries = 0; tries < 5; tries++) {
    const answer = await call("POST", `/v1/sales/${saleId}/pass`, { body: wish, auth: identity(false) });
    if (answer.status === 201) { pass = answer.doc.pass; store.set("pass:" + saleId, pass); return true; }
    const challenge = answer.doc && answer.doc.challenge;
    if (answer.status === 403 && challenge && challenge.kind === "pow") { trouble = T.solving; paint(); wish.challenge = await solve(challenge); trouble = ""; continue; }
    if (answer.status === 403 && challenge) { trouble = T.captcha; return false; }
    if (answer.status === 401) { if (!token) development = false; trouble = T.login; return false; }
    if (answer.status === 0 || answer.status === 429 || answer.status === 503) { await sleep(backoff(answer.retryS)); continue; }
    trouble = (answer.doc && answer.doc.detail) || "";
    return false;
  }
  return false;
}
async function join(again) {
  if (!pass && !(await getPass())) return;
  for (let tries = 0; tries < 40; tries++) { // the same request again is always safe: one buyer, one ticket
    const answer = await call("POST", `/v1/sales/${saleId}/tickets`, { body: { sku: sku(), units: Number($("units").value) || 1, ...(again ? { again: true } : {}) }, auth: identity() });
    if (answer.status === 200 || answer.status === 202) {
      failures = 0;
      if (answer.doc.ticket) keep(answer.doc); else { trouble = T.isSoldOut; sale.state = "sold_out"; }
      return;
    }
    const code = answer.doc && answer.doc.code;
    if (code === "ticket_exists") { const found = await call("GET", `/v1/tickets/${answer.doc.ticket}`, { auth: identity() }); keep(found.doc); return; }
    if (code === "auth_invalid" && pass) { pass = null; store.drop("pass:" + saleId); if (!(await getPass())) return; continue; }
    if (answer.status !== 0 && answer.status !== 429 && answer.status !== 503) { trouble = (answer.doc && answer.doc.detail) || String(answer.status); return; }
    await sleep(backoff(answer.retryS));
  }
}
async function pay() {
  const channel = sale.default_channel || sale.channels[0];
  const answer = await call("POST", `/v1/tickets/${ticket.ticket}/payment`, { body: { channel, return_url: location.origin + location.pathname }, auth: identity() });
  if (answer.status === 202) return keep(answer.doc);
  if (answer.doc && answer.doc.code === "return_url") { // this page's address is not one of the sale's: pay without coming back
    const plain = await call("POST", `/v1/tickets/${ticket.ticket}/payment`, { body: { channel }, auth: identity() });
    if (plain.status === 202) return keep(plain.doc);
  }
  if (answer.status >= 400 && answer.status !== 503) trouble = (answer.doc && answer.doc.detail) || "";
}
async function once(work) {
  if (busy) return;
  busy = true; trouble = ""; paint();
  try { await work(); } finally { busy = false; paint(); wake(); }
}
$("go").addEventListener("click", () => once(() => ticket && ticket.state === "reserved" ? pay() : join(Boolean(ticket))));
$("leave").addEventListener("click", () => { if (confirm(T.sure)) once(async () => {
  const answer = await call("DELETE", `/v1/tickets/${ticket.ticket}`, { auth: identity() });
  if (answer.status === 200 || answer.status === 202) keep(answer.doc); else trouble = (answer.doc && answer.doc.detail) || "";
}); });

// --- loops
async function follow() { // the ticket, as often as the server says
  const kept = store.get("ticket:" + saleId); // a new phone or a cleared browser keeps none: ask for the newest one by name
  if (kept || token || pass) {
    const answer = await call("GET", kept ? `/v1/tickets/${kept}` : `/v1/sales/${saleId}/ticket`, { auth: identity() });
    if (answer.status === 200) keep(answer.doc);
    else if (answer.status === 404) store.drop("ticket:" + saleId);
    else if (answer.status === 401) { pass = null; store.drop("pass:" + saleId); }
    paint();
  }
  for (;;) {
    if (!ticket || ticket.poll_after_ms === null) { await sleep(60000); continue; }
    await sleep(Math.min(ticket.poll_after_ms, 2 ** 31 - 1));
    if (document.hidden && ticket.state === "waiting") continue; // polled when the page is looked at again
    const asked = ticket.ticket, answer = await call("GET", `/v1/tickets/${asked}`, { auth: identity() });
    if (answer.status === 200) { failures = 0; if (ticket.ticket === asked) keep(answer.doc); }
    else if (answer.status === 401) { pass = null; store.drop("pass:" + saleId); await sleep(1000); }
    else if (answer.status === 404) { store.drop("ticket:" + saleId); ticket = null; }
    else { const wait = backoff(answer.retryS); await sleep(wait); }
    paint();
  }
}
async function watchSale() {
  for (;;) {
    const answer = await call("GET", `/v1/sales/${saleId}`);
    if (answer.status === 200) { failures = 0; sale = answer.doc; show("sale", true); paint(); }
    else if (answer.status === 404 && !sale) { location.replace("/"); return; }
    const at = phase(), toLine = sale ? Date.parse(sale.line_opens_at) - now() : 0, toOpen = sale ? Date.parse(sale.opens_at) - now() : 0;
    const next = at === "scheduled" ? Math.min(60000, Math.max(1500, toLine / 2)) : at === "line_open" ? Math.min(30000, Math.max(1500, toOpen / 2)) : at === "closed" ? 60000 : 4000;
    await sleep((answer.status === 200 ? next : backoff(answer.retryS)) * (0.8 + Math.random() * 0.4));
  }
}
async function tellTime() {
  for (;;) {
    const began = Date.now(), answer = await call("GET", "/v1/time"), ended = Date.now();
    if (answer.status === 200 && ended - began < 2000) offset = answer.doc.now_ms - (began + ended) / 2;
    await sleep(answer.status === 200 ? 60000 : 3000);
  }
}
async function listSales() {
  show("list", true);
  for (;;) {
    const answer = await call("GET", "/v1/sales");
    if (answer.status === 200) {
      const box = $("sales");
      box.replaceChildren(...answer.doc.data.map(one => {
        const row = document.createElement("li"), link = document.createElement("a"), when = document.createElement("small");
        link.href = `/s/${one.id}`; link.textContent = one.title;
        when.textContent = new Date(one.opens_at).toLocaleString(navigator.language) + " · " + ({ open: T.isOpen, paused: T.isPaused, sold_out: T.isSoldOut, closed: T.isClosed }[one.state] || "");
        link.append(when); row.append(link); return row;
      }));
      show("none", answer.doc.data.length === 0);
    }
    await sleep(5000);
  }
}
tellTime();
if (saleId) { watchSale(); follow(); setInterval(() => { if (!document.hidden) paint(); }, 500); }
else listSales();
