// The buyer's page. No framework, no build step. It polls as the server tells it, keeps its ticket in localStorage, and
// on a bad network simply asks again: the ticket is the place, not the connection.
"use strict";

const WORDS = {
  en: {
    sales: "Sales", noSales: "There is no sale at the moment.", choose: "Choose", leave: "Leave the line", leaveOrder: "Give it back",
    draw: "How the draw works", phone: "Phone number for the result (optional)", units: "How many", join: "Join", joinDraw: "Join the draw", joining: "One moment…",
    again: "Join again", login: "Open this page from the shop's app to take part.", pay: "Pay", preparing: "The payment link is being made…",
    retryPay: "Get a new payment link", offline: "No connection, trying again…", busy: "Very busy, trying again…",
    lineOpensIn: "The line opens in", opensIn: "The sale starts in", isOpen: "The sale is open", paused: "Paused for a moment", isPaused: "Paused for a moment. Your place is kept.",
    isSoldOut: "Sold out", isClosed: "The sale is over", plenty: "in stock", few: "few left", none: "none left",
    waiting: "You are in the line", inDraw: "You are in the draw", drawHint: "Places are drawn at the opening. You may close this page.",
    ahead: n => n === 0 ? "You are next" : `${n} ahead of you`, eta: (a, b) => a === b ? `about ${a}` : `about ${a} to ${b}`,
    standby: "Waiting for a returned unit", claimed: "You got it! Your order is being written…", reserved: "It is yours. Please pay.",
    payBy: t => `Pay within ${t}`, paid: "Paid. Thank you!", sold_out: "Sold out before your turn. Sorry!", closed: "The sale ended before your turn.",
    left: "You left the line.", expired: "Not paid in time; the unit went to the next in line.", cancelled: "The order was cancelled.",
    refunded: "Your money is on its way back.", lapsed: "Your place was lost on our side. Please join again.", leaving: "Giving it back…",
    unknownPay: "The payment is being checked…", order: n => `Order ${n}`, solving: "Checking that you are not a robot…",
    captcha: "This sale asks for a captcha: open it from the shop's page.", captchaFailed: "The captcha could not be shown. Please try again.",
    getReady: "Get ready", isReady: "Ready: join when the line opens", payElsewhere: "Please pay in the shop's app.", how: "Pay with",
    badPhone: "Please write the number with its country code: +86…", fewer: n => `Fewer than ${n} are left. Try a smaller number.`, s: "s", min: "min", h: "h", d: "d",
    keepOpen: "Your place is kept even if you close this page.", sure: "Really give up your place?",
    lineIn: t => `line opens ${t}`, opensAt: t => `opens ${t}`,
    refused: {
      audience: "This sale is for invited buyers.", limit_reached: "That is more than one buyer may have.", not_open_yet: "The line is not open yet.",
      sale_closed: "The sale is over", no_such_item: "This is not on sale any more.", line_full: "The line is full. Trying again as places become free…",
      already_paid: "It is paid. Ask the shop for a refund.", payment_unknown: "The payment is being checked…", payment_in_progress: "The payment is being checked…",
      not_payable: "This can no longer be paid.", unknown_channel: "This way to pay is not available.", auth_missing: "Open this page from the shop's app to take part.",
      auth_invalid: "Open this page from the shop's app to take part.", busy: "Very busy. Please try again.", slow_down: "Very busy. Please try again.",
    },
    failed: code => `That did not work (${code}). Please try again.`,
  },
  zh: {
    sales: "抢购活动", noSales: "目前没有活动。", choose: "请选择", leave: "退出排队", leaveOrder: "放弃名额",
    draw: "抽签规则", phone: "接收结果的手机号（选填）", units: "数量", join: "立即抢购", joinDraw: "参加抽签", joining: "请稍候…",
    again: "重新排队", login: "请从商城打开本页面参加。", pay: "去支付", preparing: "正在生成支付链接…",
    retryPay: "重新获取支付链接", offline: "网络不稳定，正在重试…", busy: "人数较多，正在重试…",
    lineOpensIn: "距开始排队", opensIn: "距开抢", isOpen: "正在抢购", paused: "活动暂停", isPaused: "活动暂停，您的位置已保留。",
    isSoldOut: "已售罄", isClosed: "活动已结束", plenty: "有货", few: "即将售罄", none: "无货",
    waiting: "正在排队", inDraw: "您已参加抽签", drawHint: "开抢时抽签决定顺序，可以关闭本页面。",
    ahead: n => n === 0 ? "下一位就是您" : `前面还有 ${n} 人`, eta: (a, b) => a === b ? `预计 ${a}` : `预计 ${a} 至 ${b}`,
    standby: "候补中，等待释放的名额", claimed: "抢到了！正在生成订单…", reserved: "名额已为您保留，请尽快支付。",
    payBy: t => `请在 ${t} 内支付`, paid: "支付成功，谢谢！", sold_out: "很遗憾，轮到您之前已售罄。", closed: "轮到您之前活动已结束。",
    left: "您已退出排队。", expired: "超时未支付，名额已转给下一位。", cancelled: "订单已取消。",
    refunded: "退款处理中。", lapsed: "系统故障，您的位置已失效，请重新排队。", leaving: "正在释放名额…",
    unknownPay: "正在确认支付结果…", order: n => `订单号 ${n}`, solving: "正在进行安全验证…",
    captcha: "本活动需要人机验证，请从商城页面进入。", captchaFailed: "人机验证加载失败，请重试。",
    getReady: "提前准备", isReady: "已准备好，排队开始后即可参加", payElsewhere: "请在商城 App 内支付。", how: "支付方式",
    badPhone: "手机号有误，请检查后重试。", fewer: n => `剩余不足 ${n} 件，请减少数量。`, s: "秒", min: "分", h: "小时", d: "天",
    keepOpen: "关闭本页面也会保留您的位置。", sure: "确定放弃您的位置吗？",
    lineIn: t => `${t} 开始排队`, opensAt: t => `${t} 开抢`,
    refused: {
      audience: "本活动仅限受邀用户。", limit_reached: "超过每人限购数量。", not_open_yet: "排队尚未开始。",
      sale_closed: "活动已结束", no_such_item: "该商品已不在活动中。", line_full: "队伍已满，有空位时自动重试…",
      already_paid: "已支付，如需退款请联系商城。", payment_unknown: "正在确认支付结果…", payment_in_progress: "正在确认支付结果…",
      not_payable: "该订单已无法支付。", unknown_channel: "该支付方式不可用。", auth_missing: "请从商城打开本页面参加。",
      auth_invalid: "请从商城打开本页面参加。", busy: "人数较多，请重试。", slow_down: "人数较多，请重试。",
    },
    failed: code => `操作失败（${code}），请重试。`,
  },
};
const zh = /^zh/i.test(navigator.language || "");
const T = zh ? WORDS.zh : WORDS.en;
document.documentElement.lang = zh ? "zh-CN" : "en";
const $ = id => document.getElementById(id);
const show = (id, on) => { $(id).hidden = !on; };
const put = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; }; // a screen reader reads what changes
const why = answer => { const code = answer.doc && answer.doc.code; return T.refused[code] || T.failed(code || answer.status); };
for (const element of document.querySelectorAll("[data-t]")) element.textContent = T[element.dataset.t];

const ENDED = new Set(["paid", "sold_out", "closed", "left", "expired", "cancelled", "refunded", "lapsed"]);
const store = {
  get(key) { try { return localStorage.getItem("fairdrop:" + key) ?? memory[key] ?? null; } catch { return memory[key] ?? null; } },
  set(key, value) { memory[key] = value; try { localStorage.setItem("fairdrop:" + key, value); } catch { /* private mode */ } },
  drop(key) { delete memory[key]; try { localStorage.removeItem("fairdrop:" + key); } catch { /* private mode */ } },
};
const memory = {};

// --- who is the buyer: #pass=… or #token=… from the shop, a postMessage {type: "fairdrop", token | pass}, else (development) made here
const saleId = (/^\/s\/([a-z0-9-]+)$/.exec(location.pathname) || [])[1] || null;
let token = null;
let pass = saleId && store.get("pass:" + saleId);
function fromShop() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (given.get("token")) token = given.get("token");
  if (given.get("pass") && saleId) { pass = given.get("pass"); store.set("pass:" + saleId, pass); }
  if (given.get("token") || given.get("pass")) history.replaceState(null, "", location.pathname); // not into history or screenshots
}
fromShop();
addEventListener("hashchange", () => { fromShop(); paint(); wake(); }); // the same page again, with another token
// An app's referrer has no origin of its own ("null"), and nor has a frame in a sandbox: that one is not the shop.
const SHOPS = [location.origin, ...(/^https?:/.test(document.referrer) ? [new URL(document.referrer).origin] : [])];
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
    net(answer.status === 503 || answer.status === 429 ? T.busy : "");
    return { status: answer.status, doc: document_, retryS: Number(answer.headers.get("Retry-After")) || 0 };
  } catch {
    net(T.offline);
    return { status: 0, doc: null, retryS: 0 };
  } finally {
    clearTimeout(timer);
  }
}
function net(text) { $("net").textContent = text; show("net", Boolean(text)); }
const sleepers = new Set();
const sleep = ms => new Promise(done => {
  const up = () => { clearTimeout(timer); sleepers.delete(up); done(); }, timer = setTimeout(up, ms);
  sleepers.add(up);
});
function wake() { for (const up of [...sleepers]) up(); }
const PATIENT = 40; // tries of what a tap wants: some minutes, as long as a store that is made anew may need
async function insist(tries, method, path, options) { // what may be asked again: no connection, 429 and 503 change nothing
  for (;;) {
    const answer = await call(method, path, options);
    if (![0, 429, 503].includes(answer.status) || --tries <= 0) return answer;
    await sleep(backoff(answer.retryS));
  }
}
addEventListener("online", wake);
addEventListener("pageshow", event => { if (event.persisted) wake(); }); // back from the supplier's page
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
  put("title", sale.title);
  const said = [sale.message, ticket && ticket.message !== sale.message && ticket.message].filter(Boolean).join("\n");
  put("message", said); // the shop's words to everyone, and an SMS that no channel took
  show("message", Boolean(said));
  const at = phase();
  put("state", { scheduled: T.lineOpensIn, line_open: T.opensIn, open: T.isOpen, paused: T.isPaused, sold_out: T.isSoldOut, closed: T.isClosed }[at] || "");
  const to = at === "scheduled" ? sale.line_opens_at : at === "line_open" ? sale.opens_at : null;
  put("clock", to ? digits((Date.parse(to) - now()) / 1000) : "");
  paintItems();
  paintTicket();
  const live = ticket && !ENDED.has(ticket.state);
  const mayAgain = ticket && ["left", "expired", "cancelled", "lapsed"].includes(ticket.state);
  document.title = ticket && ticket.state !== "waiting" ? `${$("word").textContent} · ${sale.title}` : sale.title; // seen from another tab
  const ready = at === "scheduled" && !pass; // the pass, and what it asks for, is got before the minute
  const joinable = ready || ["line_open", "open", "paused"].includes(at);
  const known = Boolean(pass || token || development !== false);
  show("go", !live && at !== "closed" && !(ticket && ticket.state === "paid"));
  put("go", busy ? T.joining : ready ? T.getReady : at === "scheduled" ? T.isReady : mayAgain ? T.again : at === "line_open" ? T.joinDraw : at === "sold_out" ? T.isSoldOut : T.join);
  $("go").disabled = busy || !joinable || !known;
  show("who", !live && !pass && known && joinable && !(ticket && ticket.state === "paid"));
  show("leave", Boolean(live) && !ticket.leaving);
  put("leave", ticket && ticket.state !== "waiting" ? T.leaveOrder : T.leave);
  const payment = ticket && ticket.payment;
  const url = ticket && ticket.state === "reserved" && payment && payment.state === "ready" && /^https?:/.test(payment.url || "") ? payment.url : null;
  show("pay", Boolean(url));
  if (url) { $("pay").href = url; put("pay", T.pay); }
  // A link that is no address of the web (a code for an app, an SDK's parameters) is the shop's app's to use.
  const asks = Boolean(ticket && ticket.state === "reserved" && !ticket.leaving && !(payment && ["starting", "unknown", "paid", "ready"].includes(payment.state)));
  if (asks) { show("go", true); $("go").disabled = busy; put("go", busy ? T.joining : payment && payment.state === "failed" ? T.retryPay : T.pay); }
  if ($("channel").length !== sale.channels.length) {
    $("channel").replaceChildren(...sale.channels.map(one => new Option(channelName(one), one)));
    if (sale.default_channel) $("channel").value = sale.default_channel;
  }
  show("how", asks && sale.channels.length > 1);
  put("problem", known ? trouble : T.login);
  show("problem", Boolean($("problem").textContent));
  $("draw").href = `/v1/sales/${sale.id}/draw`;
}
function channelName(channel) {
  const brand = { alipay: ["支付宝", "Alipay"], wechat: ["微信支付", "WeChat Pay"], stripe: ["银行卡", "Card"] }[channel.split("-")[0]];
  return brand && sale.channels.filter(one => one.split("-")[0] === channel.split("-")[0]).length === 1 ? brand[zh ? 0 : 1] : channel;
}
function paintItems() {
  const box = $("items"), over = phase() === "closed", key = JSON.stringify([sale.items, over]);
  if (box.dataset.key !== key) {
    const chosen = sku();
    for (const old of box.querySelectorAll(".item")) old.remove();
    sale.items.forEach((item, index) => {
      const label = document.createElement("label"), radio = document.createElement("input"), name = document.createElement("span"), left = document.createElement("small");
      label.className = "item"; radio.type = "radio"; radio.name = "sku"; radio.value = item.sku;
      radio.checked = chosen ? chosen === item.sku : index === 0;
      name.textContent = `${item.title} ${money(item)}`; left.textContent = over ? "" : T[item.availability] || "";
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
  put("word", t.leaving ? T.leaving : waiting ? (t.standby ? T.standby : t.rank === null ? T.inDraw : T.waiting) : T[t.state] || t.state);
  if (waiting && t.ahead !== null) seenAhead = Math.min(seenAhead, t.ahead); // a place never gets worse
  put("ahead", waiting && t.ahead !== null ? T.ahead(seenAhead) : "");
  put("eta", waiting && t.eta_s ? T.eta(span(t.eta_s.p50), span(t.eta_s.p90)) : "");
  const paying = t.state === "reserved" && payment ? { starting: T.preparing, unknown: T.unknownPay, ready: /^https?:/.test(payment.url || "") ? "" : T.payElsewhere }[payment.state] || "" : "";
  put("hint", t.notice ? t.notice.text[zh ? "zh-CN" : "en"] || t.notice.text.en || "" : waiting ? (t.rank === null ? T.drawHint : T.keepOpen) : paying);
  put("deadline", t.state === "reserved" && t.order && t.order.pay_by ? T.payBy(span((Date.parse(t.order.pay_by) - now()) / 1000)) : "");
  put("order", t.order ? T.order(t.order.order_no) : "");
}

// --- what the one button does
// Proof of work: SHA-256("token:nonce") with leading zero bits, in slices so that the page stays alive. Written out, because
// a page without https has no crypto.subtle, and that one, asked for one small hash at a time, is ten times slower.
const ROUND = [], START = [];
for (let n = 2; ROUND.length < 64; n++) {
  let prime = true;
  for (let by = 2; by * by <= n; by++) if (n % by === 0) prime = false;
  if (!prime) continue;
  if (START.length < 8) START.push((Math.sqrt(n) % 1) * 2 ** 32 | 0);
  ROUND.push((Math.cbrt(n) % 1) * 2 ** 32 | 0);
}
const W = new Int32Array(64);
const turn = (x, by) => (x >>> by) | (x << (32 - by));
function squeeze(state, bytes, from) { // one block of 64 bytes; FIPS 180-4, 6.2.2
  for (let at = 0; at < 16; at++) W[at] = (bytes[from + 4 * at] << 24) | (bytes[from + 4 * at + 1] << 16) | (bytes[from + 4 * at + 2] << 8) | bytes[from + 4 * at + 3];
  for (let at = 16; at < 64; at++) {
    const x = W[at - 15], y = W[at - 2];
    W[at] = (W[at - 16] + (turn(x, 7) ^ turn(x, 18) ^ (x >>> 3)) + W[at - 7] + (turn(y, 17) ^ turn(y, 19) ^ (y >>> 10))) | 0;
  }
  let [a, b, c, d, e, f, g, h] = state;
  for (let at = 0; at < 64; at++) {
    const one = (h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + ROUND[at] + W[at]) | 0;
    const two = ((turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
    h = g; g = f; f = e; e = (d + one) | 0; d = c; c = b; b = a; a = (one + two) | 0;
  }
  return [state[0] + a | 0, state[1] + b | 0, state[2] + c | 0, state[3] + d | 0, state[4] + e | 0, state[5] + f | 0, state[6] + g | 0, state[7] + h | 0];
}
function zeroBits(words) {
  for (let at = 0; at < 8; at++) if (words[at]) return 32 * at + Math.clz32(words[at]);
  return 256;
}
async function solve({ token: riddle, bits }) {
  const text = new TextEncoder().encode(`${riddle}:`), whole = text.length - text.length % 64;
  let fixed = START;
  for (let at = 0; at < whole; at += 64) fixed = squeeze(fixed, text, at); // the same for every nonce
  const rest = text.subarray(whole);
  for (let nonce = 0, since = Date.now(); ; nonce++) {
    const digits_ = String(nonce), size = rest.length + digits_.length, tail = new Uint8Array(size + 9 > 64 ? 128 : 64);
    tail.set(rest);
    for (let at = 0; at < digits_.length; at++) tail[rest.length + at] = digits_.charCodeAt(at);
    tail[size] = 128;
    new DataView(tail.buffer).setUint32(tail.length - 4, 8 * (whole + size));
    let words = squeeze(fixed, tail, 0);
    if (tail.length > 64) words = squeeze(words, tail, 64);
    if (zeroBits(words) >= bits) return { token: riddle, nonce: digits_ };
    if (nonce % 256 === 0 && Date.now() - since > 30) { await new Promise(done => setTimeout(done)); since = Date.now(); }
  }
}
function script(address) {
  return new Promise((done, failed) => {
    const element = document.createElement("script");
    element.src = address; element.onload = done; element.onerror = () => { element.remove(); failed(new Error("script")); };
    document.head.append(element);
  });
}
async function captcha({ site_key: sitekey, script: address }) { // reCAPTCHA, hCaptcha and Turnstile are drawn by the same call
  const made = () => window.turnstile || window.hcaptcha || window.grecaptcha;
  if (!made()) await script(address);
  if (made() === window.grecaptcha && window.grecaptcha.ready) await new Promise(done => window.grecaptcha.ready(done));
  const box = document.createElement("div");
  $("captcha").replaceChildren(box);
  show("captcha", true);
  try {
    return { response: await new Promise((callback, failed) => made().render(box, { sitekey, callback, "error-callback": () => failed(new Error("captcha")) })) };
  } finally { show("captcha", false); $("captcha").replaceChildren(); }
}
function contact() { // null: none is wished for. A number without its country is one of China's where the page speaks Chinese
  const typed = $("phone").value.replace(/[\s()-]/g, ""), phone = zh && /^1[3-9]\d{9}$/.test(typed) ? "+86" + typed : typed.replace(/^00/, "+");
  if (!phone) return null;
  if (!/^\+[1-9]\d{6,14}$/.test(phone)) throw new Error(T.badPhone);
  return { phone, language: zh ? "zh-CN" : "en" };
}
async function getPass() {
  const wish = { source: "page" };
  try { const given = contact(); if (given) wish.contact = given; } catch (error) { trouble = error.message; $("phone").focus(); return false; }
  for (let tries = 0; tries < 3; tries++) {
    const answer = await insist(PATIENT, "POST", `/v1/sales/${saleId}/pass`, { body: wish, auth: identity(false) });
    if (answer.status === 201) { pass = answer.doc.pass; store.set("pass:" + saleId, pass); return true; }
    const challenge = answer.status === 403 && answer.doc && answer.doc.challenge;
    if (!challenge) {
      if (answer.status === 401 && !token) development = false;
      trouble = why(answer);
      return false;
    }
    if (challenge.kind === "pow") { trouble = T.solving; paint(); wish.challenge = await solve(challenge.params); trouble = ""; continue; }
    if (challenge.kind !== "captcha" || !challenge.params.script) { trouble = T.captcha; return false; }
    try { wish.challenge = await captcha(challenge.params); } catch { break; }
  }
  trouble = T.captchaFailed;
  return false;
}
async function join(again) {
  if (!pass && !(await getPass())) return;
  const units = sale.limit_per_buyer > 1 ? Number($("units").value) || 1 : 1, wanted = sku();
  for (let tries = 0; tries < PATIENT; tries++) { // the same request again is always safe: one buyer, one ticket
    const answer = await call("POST", `/v1/sales/${saleId}/tickets`, { body: { sku: wanted, units, ...(again ? { again: true } : {}) }, auth: identity() });
    if (answer.status === 200 || answer.status === 202) {
      failures = 0; trouble = "";
      if (answer.doc.ticket) keep(answer.doc); else trouble = units > 1 ? T.fewer(units) : T.isSoldOut;
      return;
    }
    const code = answer.doc && answer.doc.code;
    if (code === "ticket_exists") { const found = await insist(5, "GET", `/v1/tickets/${answer.doc.ticket}`, { auth: identity() }); keep(found.doc); return; }
    if (code === "auth_invalid" && pass) { pass = null; store.drop("pass:" + saleId); if (!(await getPass())) return; continue; }
    trouble = answer.status === 0 || code === "busy" ? "" : why(answer);
    if (answer.status !== 0 && answer.status !== 429 && answer.status !== 503) return;
    paint();
    await sleep(backoff(answer.retryS));
  }
  trouble = T.refused.busy;
}
async function pay() {
  const channel = $("channel").value || sale.default_channel || sale.channels[0], path = `/v1/tickets/${ticket.ticket}/payment`;
  let answer = await insist(5, "POST", path, { body: { channel, return_url: location.origin + location.pathname }, auth: identity() });
  // This page's address is not one of the sale's: pay without coming back.
  if (answer.doc && answer.doc.code === "return_url") answer = await insist(5, "POST", path, { body: { channel }, auth: identity() });
  if (answer.status === 202) keep(answer.doc); else if (answer.status) trouble = why(answer);
}
async function leave() {
  const answer = await insist(5, "DELETE", `/v1/tickets/${ticket.ticket}`, { auth: identity() });
  if (answer.status === 200 || answer.status === 202) keep(answer.doc); else if (answer.status) trouble = why(answer);
}
async function once(work) {
  if (busy) return;
  busy = true; trouble = ""; paint();
  try { await work(); } finally { busy = false; paint(); wake(); }
}
$("go").addEventListener("click", () => once(() => ticket && ticket.state === "reserved" ? pay() : phase() === "scheduled" ? getPass() : join(Boolean(ticket))));
$("leave").addEventListener("click", () => { if (confirm(T.sure)) once(leave); });

// --- loops
const HIDDEN_POLL_MS = 15000; // nobody looks at the place; that it was won shows in the tab's title
async function look(kept) { // a new phone or a cleared browser keeps none: ask for the newest one by name
  const answer = await insist(5, "GET", kept ? `/v1/tickets/${kept}` : `/v1/sales/${saleId}/ticket`, { auth: identity() });
  if (answer.status === 200) keep(answer.doc);
  else if (answer.status === 404) store.drop("ticket:" + saleId);
  else if (answer.status === 401) { pass = null; store.drop("pass:" + saleId); }
  paint();
}
addEventListener("storage", async event => { // another tab of the same buyer has joined
  if (event.key === "fairdrop:pass:" + saleId && event.newValue) pass = event.newValue;
  if (event.key !== "fairdrop:ticket:" + saleId || !event.newValue || (ticket && ticket.ticket === event.newValue)) return;
  await look(event.newValue);
  wake();
});
async function follow() { // the ticket, as often as the server says
  const kept = store.get("ticket:" + saleId);
  if (kept || token || pass) await look(kept);
  for (;;) {
    if (!ticket || ticket.poll_after_ms === null) { await sleep(60000); continue; }
    await sleep(Math.min(ticket.poll_after_ms, 2 ** 31 - 1));
    if (document.hidden && ticket.state === "waiting") await sleep(HIDDEN_POLL_MS);
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
        const at = time => new Date(time).toLocaleString(navigator.language, { dateStyle: "medium", timeStyle: "short" });
        when.textContent = { open: T.isOpen, paused: T.paused, sold_out: T.isSoldOut, closed: T.isClosed, scheduled: T.lineIn(at(one.line_opens_at)), line_open: T.opensAt(at(one.opens_at)) }[one.state] || at(one.opens_at);
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
