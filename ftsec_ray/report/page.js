"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
/* An element with attributes and children; strings become text nodes, so that no text is ever markup. */
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
};
const seedsText = (count) => count === 1 ? "1 seed" : count + " seeds";
/* What stands in a square: the second to fourth texts of data.values. */
const nText = (value) => [value[3] === null ? "" : "n " + value[3], value[4]].filter(Boolean).join(" · ");
const seedText = (value) => (seedsText(value[5]) + " " + value[6]).trim();

/* The grid: the chosen metric, and the arrow keys. */
const metric = at("metric");
const squares = all("td[data-i]");
const isOpen = (cell) => cell && cell.matches("td[data-i]") && !cell.matches(".off") && !cell.parentElement.matches(".off");
/* One square of each grid is in the order of the Tab key: the one given, or where that is filtered out the first that is not. */
const roving = (table, wanted) => {
  const old = table.querySelector("td[tabindex='0']"), cell = [wanted, old].find(isOpen) || all("td[data-i]", table).find(isOpen);
  if (old) old.tabIndex = -1;
  if (cell) cell.tabIndex = 0;
};
{
  const put = (cell, selector, text) => { const found = cell.querySelector(selector); if (found) found.textContent = text; };
  const draw = () => {
    const about = data.metrics.find((one) => one.name === metric.value);
    if (!about) return;
    for (const id of ["good", "bad", "meaning"]) at(id).textContent = about[id];
    at("measure").textContent = about.title;
    for (const cell of squares) {
      if (!cell.querySelector(".n")) continue; // failed or pending
      const value = data.values[metric.value][Number(cell.dataset.i)];
      cell.className = (value && value[0] >= 0 ? "h" + value[0] : "empty") + (cell.classList.contains("broken") ? " broken" : "");
      put(cell, "b", value ? value[1] : "–");
      put(cell, ".ci", value ? value[2] : "");
      put(cell, ".n", value ? nText(value) : "");
      put(cell, ".s", value ? seedText(value) : "");
    }
  };
  metric.addEventListener("change", draw);
  if (metric.selectedOptions.length && !metric.selectedOptions[0].defaultSelected) draw(); // a browser may restore a choice

  const steps = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
  const next = (cell, [down, right]) => {
    const rows = [...cell.parentElement.parentElement.rows];
    let row = cell.parentElement.sectionRowIndex, column = cell.cellIndex;
    do {
      row += down;
      column += right;
      if (!rows[row] || column < 1 || column >= rows[row].cells.length) return null;
    } while (!isOpen(rows[row].cells[column]));
    return rows[row].cells[column];
  };
  for (const table of all("table.heat")) {
    roving(table);
    table.addEventListener("focusin", (event) => { if (isOpen(event.target)) roving(table, event.target); });
    table.addEventListener("click", (event) => {
      const cell = event.target.closest("td[data-i]");
      if (cell) { cell.focus(); openCell(Number(cell.dataset.i)); }
    });
    table.addEventListener("keydown", (event) => {
      const cell = event.target;
      if (!isOpen(cell)) return;
      const row = [...cell.parentElement.cells].filter(isOpen);
      const target = steps[event.key] ? next(cell, steps[event.key]) : event.key === "Home" ? row[0] : event.key === "End" ? row[row.length - 1] : null;
      if (target) target.focus();
      if (event.key === "Enter" || event.key === " ") openCell(Number(cell.dataset.i));
      if (target || steps[event.key] || event.key === "Enter" || event.key === " ") event.preventDefault();
    });
  }
}

/* The filters of the whole page: what carries the number of a model, attack or defense hides when that is filtered out. */
{
  const chosen = {attack: "", defense: "", family: "", size: ""};
  const acts = (method, phase) => !phase || !method.phases.length || method.phases.includes(phase);
  const model = (one) => (!chosen.family || one.family === chosen.family) && (!chosen.size || one.size === chosen.size);
  const faceted = all("[data-model],[data-attack],[data-defense],[data-family]");
  const forest = document.querySelector("svg.forest");
  const sections = all("main section").filter((one) => one.querySelector("[data-model],[data-attack],[data-family]"))
    .map((one) => [one, one.insertBefore(make("p", {class: "nothing notice off"}, "Nothing here under these filters."), one.children[1])]);
  const apply = () => {
    const models = data.models.map(model);
    const attacks = data.attacks.map((one) => acts(one, chosen.attack));
    const defenses = data.defenses.map((one) => acts(one, chosen.defense));
    for (const one of faceted) {
      const {model: m, attack: a, defense: d, family: f} = one.dataset;
      one.classList.toggle("off", !((m === undefined || models[m]) && (a === undefined || attacks[a]) && (d === undefined || defenses[d])
        && (f === undefined || !chosen.family || f === chosen.family)));
    }
    for (const [section, nothing] of sections) nothing.classList.toggle("off", all("[data-model],[data-attack],[data-family]", section).some((one) => !one.closest(".off")));
    const shown = data.squares.filter((one) => models[one.at[0]] && attacks[one.at[1]] && defenses[one.at[2]]).length;
    at("showing").textContent = shown === data.squares.length ? "" : shown + " of " + data.squares.length + " squares";
    all("table.heat").forEach((table) => roving(table));
    if (forest) stack(forest);
  };
  /* The first lines of the forest plot that are not filtered out, one below the other. */
  const stack = (svg) => {
    const {top, line, shown} = svg.dataset;
    const lines = all("g.line", svg);
    const kept = lines.filter((one) => !one.classList.contains("off")).slice(0, Number(shown));
    for (const one of lines) one.classList.toggle("off", !kept.includes(one));
    kept.forEach((one, index) => one.setAttribute("transform", "translate(0 " + (Number(top) + Number(line) * index) + ")"));
    const bottom = Number(top) + Number(line) * kept.length;
    for (const rule of all(".rule", svg)) rule.setAttribute("y2", bottom + 4);
    svg.querySelector(".foot").setAttribute("transform", "translate(0 " + bottom + ")");
    svg.setAttribute("viewBox", "0 0 " + svg.viewBox.baseVal.width + " " + (bottom + 34));
  };
  const selects = all("#filter select[data-filter]");
  for (const select of selects) {
    if (select.options.length < 3) select.parentElement.classList.add("off"); // one family, one size: nothing to choose
    select.addEventListener("change", () => { chosen[select.dataset.filter] = select.value; apply(); });
    chosen[select.dataset.filter] = select.value;
  }
  at("reset").addEventListener("click", () => {
    for (const select of selects) { select.value = ""; chosen[select.dataset.filter] = ""; }
    apply();
  });
  if (Object.values(chosen).some(Boolean)) apply();
}

/* Tables that sort by a click on a heading. */
{
  /* A number with or without its sign; what is below it ("< 1 %") comes just before it. What goes on in letters, as a digest may, is a text. */
  const NUMBER = /^(<\s*)?([+−-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)(?![\w.])/i;
  const key = (row, column) => {
    const text = row.cells[column].textContent.trim(), found = NUMBER.exec(text);
    return found ? Number(found[2].replace("−", "-")) - (found[1] ? 1e-9 : 0) : text;
  };
  const isNumber = (one) => typeof one === "number";
  /* Numbers come before texts ("–", where nothing was measured) both ways. */
  const compare = (a, b, way) => isNumber(a) !== isNumber(b) ? (isNumber(a) ? -1 : 1)
    : way * (isNumber(a) ? a - b : a.localeCompare(b, undefined, {numeric: true}));
  for (const table of all("table.sortable")) {
    for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
      if (head.querySelector(".sr")) continue;
      const button = make("span", {role: "button", tabindex: 0}); // a real button would be blank where print repeats the heading
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); button.click(); } });
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows].sort((a, b) => compare(key(a, column), key(b, column), up ? 1 : -1));
        table.tBodies[0].append(...rows);
      });
    }
  }
  window.addEventListener("beforeprint", () => { for (const one of all("details.how")) one.open = true; });
}
