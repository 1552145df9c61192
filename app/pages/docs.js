// Shows the OpenAPI document of this process. Small on purpose: no framework, nothing from elsewhere.
"use strict";
const el = (name, text, cls) => { const made = document.createElement(name); if (text !== undefined) made.textContent = text; if (cls) made.className = cls; return made; };
function table(rows, heads) {
  const made = el("table"), head = el("tr");
  for (const name of heads) head.append(el("th", name));
  made.append(head);
  for (const row of rows) { const line = el("tr"); for (const cell of row) line.append(el("td", cell)); made.append(line); }
  return made;
}
function word(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.enum) return schema.enum.map(String).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  for (const many of ["anyOf", "oneOf"]) if (schema[many]) return schema[many].map(word).join(" | ");
  return schema.type === "array" ? `${word(schema.items)}[]` : String(schema.type || "any");
}
function fields(schema, all) {
  const found = schema && schema.$ref ? all[schema.$ref.split("/").pop()] : schema;
  if (!found || !found.properties) return null;
  const needed = new Set(found.required || []);
  return table(Object.entries(found.properties).map(([name, of]) => [name + (needed.has(name) ? "" : "?"), word(of), of.description || ""]), ["field", "type", "meaning"]);
}
function operation(method, path, op, all) {
  const box = el("details"), head = el("summary"), line = el("code");
  line.append(el("span", method.toUpperCase(), "method"), " " + path);
  head.append(line, el("span", " " + (op.summary || ""), "quiet"));
  box.append(head);
  if (op.description) box.append(el("p", op.description));
  if (op.parameters) box.append(table(op.parameters.map(p => [p.name, p.in, word(p.schema), p.description || ""]), ["parameter", "in", "type", "meaning"]));
  const body = op.requestBody && op.requestBody.content && op.requestBody.content["application/json"];
  if (body) { box.append(el("p", "Body: " + word(body.schema))); const shown = fields(body.schema, all); if (shown) box.append(shown); }
  for (const [status, answer] of Object.entries(op.responses || {})) {
    box.append(el("p", `${status}: ${answer.description || ""}`));
    for (const content of Object.values(answer.content || {})) {
      const example = content.example || (content.examples && Object.values(content.examples)[0] && Object.values(content.examples)[0].value);
      if (example && Number(status) < 400) box.append(el("pre", typeof example === "string" ? example : JSON.stringify(example, null, 2)));
    }
  }
  return box;
}
fetch("/openapi.json").then(answer => answer.json()).then(api => {
  const page = document.getElementById("api"), all = (api.components && api.components.schemas) || {};
  document.title = api.info.title;
  page.replaceChildren(el("h1", `${api.info.title} ${api.info.version}`));
  for (const part of (api.info.description || "").split("\n\n")) page.append(el("p", part));
  const link = el("a", "/openapi.json"); link.href = "/openapi.json"; page.append(link);
  const groups = {};
  for (const [path, methods] of Object.entries(api.paths)) for (const [method, op] of Object.entries(methods)) (groups[(op.tags || ["other"])[0]] ||= []).push(operation(method, path, op, all));
  for (const [name, boxes] of Object.entries(groups)) page.append(el("h2", name), ...boxes);
  page.append(el("h2", "documents"));
  for (const [name, schema] of Object.entries(all)) {
    const shown = fields(schema, all);
    if (!shown) continue;
    const box = el("details"), head = el("summary"); head.append(el("code", name), el("span", " " + (schema.description || ""), "quiet"));
    box.append(head, shown); page.append(box);
  }
});
