/* Every figure as SVG and PNG, every table as CSV and LaTeX: what is shown, as it is shown. */
const addExports = (() => {
  const LATEX = {"\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "$": "\\$", "&": "\\&", "#": "\\#", "%": "\\%", "_": "\\_", "^": "\\textasciicircum{}",
    "~": "\\textasciitilde{}", "<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", "\"": "\\textquotedbl{}", "'": "\\textquotesingle{}", "`": "\\textasciigrave{}",
    "-": "{-}", "[": "{[}", "]": "{]}", "\u00a0": "~", "−": "$-$", "→": "$\\rightarrow$", "↑": "$\\uparrow$", "↓": "$\\downarrow$", "·": "$\\cdot$", "×": "$\\times$", "●": "$\\bullet$",
    "–": "--", "…": "\\dots{}", "⟨": "$\\langle$", "⟩": "$\\rangle$", "≥": "$\\geq$", "≤": "$\\leq$"};
  const latex = (text) => text.replace(/[\\{}$&#%_^~<>|"'`\-[\]\u00a0−→↑↓·×●–…⟨⟩≥≤]/g, (one) => LATEX[one]);
  const isNumber = (text) => /^[+-]?\d+(\.\d+)?(e[+-]?\d+)?$/i.test(text);
  /* A cell of a CSV file: quoted where it must be, and never a formula to a spreadsheet, be it one that takes a semicolon or a tab for the end of a cell. */
  const csv = (text) => {
    const minus = text.replace("−", "-"), plain = isNumber(minus) ? minus : text;
    const whole = plain.replace(/([;\t]["'\s]*)(?=[=+\-@＝＋－＠])/g, "$1'");
    const safe = /^["'\s]*[=+\-@＝＋－＠]|^[\t\r\n]/.test(whole) && !isNumber(whole) ? "'" + whole : whole;
    return /[",;\t\r\n]/.test(safe) || safe !== safe.trim() ? "\"" + safe.replaceAll("\"", "\"\"") + "\"" : safe;
  };
  const isShown = (node) => !node.closest(".off");
  /* The lines of a table cell as a reader sees them: no buttons, and no completion that is still hidden. */
  const lines = (cell) => {
    const found = [""];
    const walk = (node) => {
      if (node.nodeType === Node.TEXT_NODE) { found[found.length - 1] += node.parentElement.closest("pre") ? node.data : node.data.replace(/\s+/g, " "); return; }
      if (node.nodeType !== Node.ELEMENT_NODE || node.matches("meter,.tools,.sr,[data-open]")) return;
      if (node.matches("details:not([open])")) { found.push("(hidden)"); return; }
      if (node.matches("summary")) return;
      const breaks = node.matches("pre,br,p") || getComputedStyle(node).display === "block";
      if (breaks) found.push("");
      node.childNodes.forEach(walk);
      if (breaks) found.push("");
    };
    cell.childNodes.forEach(walk);
    return found.map((line) => line.trim()).filter(Boolean);
  };
  const shownRows = (table) => all("tr", table).filter(isShown).map((row) => [...row.cells].filter((cell) => isShown(cell) && !cell.matches(".act") && !cell.querySelector(".sr")));
  const gridRows = (table) => {
    const head = ["model", "task", "attack", "defense", "status", "metric", "value", "95 % over prompts", "n", "null verdicts", "seeds", "95 % over seeds", "utility", "utility value", "over-refusal", "coherent", "no answer"];
    return [head, ...all("td[data-i]", table).filter(isShown).map((cell) => {
      const number = Number(cell.dataset.i), square = data.squares[number], value = (data.values[metric.value] || [])[number] || [0, "", "", "", "", square.seeds, ""];
      const names = [data.models[square.at[0]].name, square.task, data.attacks[square.at[1]].name, data.defenses[square.at[2]].name, square.status, metric.value];
      const [use = "", over = "", coherent = "", unanswered = ""] = square.utility;
      return [...names, ...value.slice(1).map((one) => one === null ? "" : String(one)), data.short[square.task][0], use, over, coherent, unanswered];
    })];
  };
  const csvOf = (table) => (table.matches(".heat") ? gridRows(table) : shownRows(table).map((row) => row.map((cell) => lines(cell).join("\n"))))
    .map((row) => row.map(csv).join(",")).join("\r\n") + "\r\n";
  const latexOf = (table) => {
    const rows = shownRows(table);
    const columns = rows[0].map((_, index) => (rows[1] || rows[0])[index] && (rows[1] || rows[0])[index].matches(".num") ? "r" : "l").join("");
    const stack = (cell) => {
      const found = lines(cell).flatMap((line) => line.split("\n")).map(latex);
      return found.length > 1 ? "\\shortstack[l]{" + found.join(" \\\\ ") + "}" : found[0] || "";
    };
    const body = rows.map((row) => row.map(stack).join(" & ") + " \\\\");
    const note = table.matches(".heat") ? "% metric: " + metric.value.replace(/\s+/g, " ") + "\n" : "";
    return "% \\usepackage{booktabs,textcomp} and \\usepackage[T1]{fontenc}; other scripts than Latin need XeLaTeX or LuaLaTeX\n" + note
      + "\\begin{tabular}{" + columns + "}\n\\toprule\n" + body[0] + "\n\\midrule\n" + body.slice(1).join("\n") + "\n\\bottomrule\n\\end{tabular}\n";
  };

  /* An SVG that stands by itself: what the page's style sheet says of it is written into it. */
  const KEPT = ["fill", "stroke", "stroke-width", "font-size", "font-weight", "opacity"];
  const alone = (svg) => {
    const copy = svg.cloneNode(true), {width, height} = svg.viewBox.baseVal;
    const [from, to] = [svg, copy].map((one) => [one, ...all("*", one)]);
    from.forEach((node, index) => {
      if (node.matches("text,.grid,.zero")) { const style = getComputedStyle(node); for (const name of KEPT) to[index].setAttribute(name, style.getPropertyValue(name)); }
    });
    for (const node of to) { if (node.matches(".off")) node.remove(); else { node.removeAttribute("class"); for (const name of Object.keys(node.dataset)) delete node.dataset[name]; } }
    return framed(copy, width, height);
  };
  const framed = (svg, width, height) => {
    const back = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of [["width", width], ["height", height], ["fill", "#fff"]]) back.setAttribute(name, value);
    svg.prepend(back);
    for (const [name, value] of [["width", width], ["height", height], ["font-family", getComputedStyle(document.body).fontFamily]]) svg.setAttribute(name, value);
    return svg;
  };
  /* The grid as an SVG: its boxes and words where the browser has put them. */
  const drawn = (table) => {
    const box = table.closest(".heatbox"), kept = [box.scrollLeft, box.scrollTop];
    box.scrollTo({left: 0, top: 0, behavior: "instant"});
    const origin = table.getBoundingClientRect(), top = 26;
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const add = (tag, attributes, text) => {
      const node = document.createElementNS(svg.namespaceURI, tag);
      for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, typeof value === "number" ? value.toFixed(1) : value);
      if (text) node.textContent = text;
      svg.append(node);
    };
    svg.setAttribute("viewBox", "0 0 " + origin.width + " " + (origin.height + top));
    add("text", {x: 6, y: 17, "font-size": 13, "font-weight": 600}, at("measure").textContent + " · " + table.getAttribute("aria-label"));
    for (const cell of all("th,td", table).filter((one) => isShown(one) && one.getClientRects().length)) {
      const rect = cell.getBoundingClientRect();
      add("rect", {x: rect.left - origin.left, y: rect.top - origin.top + top, width: rect.width, height: rect.height, fill: getComputedStyle(cell).backgroundColor, stroke: cell.matches(".broken") ? "#3b1204" : "#fff"});
      const texts = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
      while (texts.nextNode()) {
        const node = texts.currentNode, style = getComputedStyle(node.parentElement), back = style.backgroundColor;
        for (const word of node.data.matchAll(/\S+/g)) {
          const range = document.createRange();
          range.setStart(node, word.index);
          range.setEnd(node, word.index + word[0].length);
          const place = range.getBoundingClientRect();
          if (node.parentElement.matches(".flag")) add("rect", {x: place.left - origin.left - 3, y: place.top - origin.top + top, width: place.width + 6, height: place.height, fill: back});
          add("text", {x: place.left - origin.left, y: place.bottom - origin.top + top - place.height * 0.22, "font-size": style.fontSize, "font-weight": style.fontWeight, fill: style.color}, word[0]);
        }
      }
    }
    box.scrollTo({left: kept[0], top: kept[1], behavior: "instant"});
    return framed(svg, origin.width, origin.height + top);
  };

  const slug = (text) => text.normalize("NFKD").replace(/[^A-Za-z0-9.]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 80) || "report";
  const save = (blob, name) => {
    const link = make("a", {href: URL.createObjectURL(blob), download: slug(data.sweep) + "-" + name});
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const serialised = (svg) => new Blob(["<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n" + new XMLSerializer().serializeToString(svg)], {type: "image/svg+xml"});
  const savePng = (svg, name) => {
    const scale = 2, picture = new Image(), address = URL.createObjectURL(serialised(svg));
    picture.addEventListener("load", () => {
      const canvas = make("canvas", {width: Math.ceil(svg.getAttribute("width") * scale), height: Math.ceil(svg.getAttribute("height") * scale)});
      canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(blob, name + ".png"));
      URL.revokeObjectURL(address);
    });
    picture.src = address;
  };
  const button = (text, label, act) => {
    const made = make("button", {type: "button", "aria-label": label}, text);
    made.addEventListener("click", act);
    return made;
  };
  return (root) => {
    for (const table of all("table.list,table.heat", root)) {
      const name = slug(table.dataset.name || "table"), label = " of the table " + name;
      const tools = make("div", {class: "tools"}, button("CSV", "CSV" + label, () => save(new Blob([csvOf(table)], {type: "text/csv"}), name + ".csv")),
        button("LaTeX", "LaTeX" + label, () => save(new Blob([latexOf(table)], {type: "application/x-tex"}), name + ".tex")));
      if (table.matches(".heat")) tools.append(button("SVG", "SVG" + label, () => save(serialised(drawn(table)), name + ".svg")), button("PNG", "PNG" + label, () => savePng(drawn(table), name)));
      (table.closest(".scroll") || table).before(tools);
    }
    for (const figure of all("figure", root)) {
      const svg = figure.querySelector("svg"), name = slug(figure.dataset.name || "figure"), label = " of the figure " + name;
      figure.prepend(make("div", {class: "tools"}, button("SVG", "SVG" + label, () => save(serialised(alone(svg)), name + ".svg")), button("PNG", "PNG" + label, () => savePng(alone(svg), name))));
    }
  };
})();
addExports(document.querySelector("main"));
