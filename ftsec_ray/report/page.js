"use strict";
(() => {
  const heat = JSON.parse(document.getElementById("data").textContent);
  const squares = [...document.querySelectorAll("td[data-i]")];
  const metric = document.getElementById("metric");
  const put = (cell, selector, text) => { const at = cell.querySelector(selector); if (at) at.textContent = text; };
  const draw = () => {
    const about = heat.metrics.find((m) => m.name === metric.value);
    if (!about) return;
    for (const id of ["good", "bad", "meaning"]) document.getElementById(id).textContent = about[id];
    for (const cell of squares) {
      const value = heat.data[metric.value][Number(cell.dataset.i)];
      cell.className = (value && value[0] >= 0 ? "h" + value[0] : "empty") + (cell.classList.contains("broken") ? " broken" : "");
      put(cell, "b", value ? value[1] : "–");
      put(cell, ".ci", value ? value[2] : "");
      put(cell, ".n", value ? value[3] : "");
    }
  };
  metric.addEventListener("change", draw);
  if (metric.value) draw();

  const reveal = () => {
    const at = document.getElementById(location.hash.slice(1));
    if (at && at.tagName === "DETAILS") { at.hidden = false; at.open = true; at.scrollIntoView(); }
  };
  window.addEventListener("hashchange", reveal);
  reveal();

  const find = document.getElementById("find");
  if (find) {
    const cells = [...document.querySelectorAll("#cells > details")];
    find.addEventListener("input", () => {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const cell of cells) {
        const title = cell.querySelector("summary").textContent.toLowerCase();
        cell.hidden = !words.every((word) => title.includes(word));
        shown += cell.hidden ? 0 : 1;
      }
      document.getElementById("found").textContent = words.length ? shown + " of " + cells.length : "";
    });
  }

  const key = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace("−", "-"));
    return /^[−-]?[\d.]/.test(text) && !Number.isNaN(number) ? number : text;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
        const rows = [...table.tBodies[0].rows].sort((a, b) => compare(key(a, column), key(b, column)) * (up ? 1 : -1));
        table.tBodies[0].append(...rows);
      });
    }
  }

  window.addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details.how")) d.open = true; });
})();
