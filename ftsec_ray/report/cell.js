/* One cell, or two side by side: metrics, prompts, completions and verdicts. Everything here is made of text nodes when it is opened. */
const dialog = at("cell");
const openCell = (() => {
  let opener = null;
  const nameOf = (axis, number) => {
    const name = data[axis][number].name;
    return name !== "none" ? name : axis === "attacks" ? "no attack" : "no defense";
  };
  const placeOf = (square) => {
    const [model, attack, defense] = square.at;
    return data.models[model].name + (data.tasks.length > 1 ? " · " + square.task : "") + " · " + nameOf("attacks", attack) + " against " + nameOf("defenses", defense);
  };
  const flags = (square) => [
    square.incoherent ? "incoherent" : "", square.seeds === 1 ? "1 seed" : "", ["failed", "pending"].includes(square.status) ? square.status : "",
  ].filter(Boolean).map((word) => make("span", {class: "flag"}, word));
  const find = (task, model, attack, defense) => data.squares.findIndex((one) => one.task === task && one.at[0] === model && one.at[1] === attack && one.at[2] === defense);
  const rowsOf = (head, rows) => [make("thead", {}, make("tr", {}, ...head.map((text) => make("th", {scope: "col"}, text)))), make("tbody", {}, ...rows)];

  /* What was measured, of one cell or of both. */
  const metrics = (numbers) => {
    const rows = [];
    for (const about of data.metrics) {
      const values = numbers.map((number) => data.values[about.name][number]);
      if (!values.some(Boolean)) continue;
      const parts = values.flatMap((value) => value
        ? [make("td", {class: "num"}, make("b", {}, value[1])), make("td", {class: "ci"}, value[2]), make("td", {class: "ci"}, nText(value)), make("td", {class: "ci"}, seedText(value))]
        : [make("td", {class: "none num"}, "–"), make("td"), make("td"), make("td")]);
      rows.push(make("tr", {}, make("th", {scope: "row", title: about.meaning}, about.title), ...parts));
    }
    if (!rows.length) return make("p", {class: "none"}, "Nothing was measured.");
    const head = numbers.length > 1 ? ["A", "B"].flatMap((side) => [side, "95 %", "prompts", "seeds, 95 %"]) : ["value", "95 % over prompts", "prompts", "seeds, 95 % over seeds"];
    return make("div", {class: "scroll"}, make("table", {class: "list metrics", "data-name": "metrics"}, ...rowsOf(["metric", ...head], rows)));
  };

  const completion = (sample) => {
    const [, , said, verdict, judge, override, hidden] = sample;
    const word = make("span", {class: "verdict", title: data.texts[judge]}, data.texts[verdict]);
    const text = make("pre", {class: "completion"}, data.texts[said]);
    const over = override < 0 ? null : make("p", {class: "ci"}, "verdict overruled: " + data.texts[override]);
    return [word, hidden ? make("details", {class: "veil"}, make("summary", {}, "Hidden completion: open to read"), text) : text, over];
  };
  const probesOf = (number) => new Map((data.squares[number].sample || {probes: []}).probes.map((probe) => [probe.probe, probe]));
  const counts = (probe) => {
    if (!probe) return "not asked";
    const asked = probe.verdicts.reduce((sum, [, count]) => sum + count, 0);
    const nulls = (probe.verdicts.find(([verdict]) => verdict === "no verdict") || [0, 0])[1];
    return asked + " prompts: " + probe.verdicts.map(([verdict, count]) => count + " " + verdict).join(", ") + (nulls ? "" : ", 0 no verdict") + "; " + probe.rows.length + " here";
  };
  const heading = (name, ...lines) => make("h4", {}, name + " ", ...lines.map((line) => make("small", {}, line)));

  const single = (number) => [...probesOf(number)].flatMap(([name, probe]) => {
    const rows = probe.rows.map((sample) => make("tr", {}, make("td", {class: "id"}, data.texts[sample[0]]),
      make("td", {}, make("pre", {class: "prompt"}, data.texts[sample[1]])), make("td", {}, ...completion(sample))));
    const table = make("table", {class: "list turns", "data-name": "prompts-" + name}, ...rowsOf(["prompt_id", "prompt", "verdict and completion"], rows));
    return [heading(name, counts(probe)), rows.length ? table : make("p", {class: "none"}, "None of them is in this page.")];
  });

  const pair = (first, second) => {
    const [mine, other] = [probesOf(first), probesOf(second)];
    return [...new Set([...mine.keys(), ...other.keys()])].flatMap((name) => {
      const [one, two] = [mine.get(name), other.get(name)];
      const of = (probe) => new Map((probe ? probe.rows : []).map((sample) => [data.texts[sample[0]], sample]));
      const [left, right] = [of(one), of(two)];
      const ids = [...left.keys()].filter((id) => right.has(id));
      const differ = ids.filter((id) => left.get(id)[3] !== right.get(id)[3]);
      const rows = ids.map((id) => {
        const prompts = left.get(id)[1] === right.get(id)[1] ? [left.get(id)[1]] : [left.get(id)[1], right.get(id)[1]];
        return make("tr", {class: differ.includes(id) ? "differs" : "same"}, make("td", {class: "id"}, id), make("td", {}, ...prompts.map((text) => make("pre", {class: "prompt"}, data.texts[text]))),
          make("td", {}, ...completion(left.get(id))), make("td", {}, ...completion(right.get(id))));
      });
      const table = make("table", {class: "list turns", "data-name": "pair-" + name}, ...rowsOf(["prompt_id", "prompt", "A", "B"], rows));
      const sum = ids.length + " prompts in both, " + differ.length + " with another verdict";
      return [heading(name, sum, "A: " + counts(one), "B: " + counts(two)), rows.length ? table : make("p", {class: "none"}, "No prompt of this probe is here for both cells.")];
    });
  };

  /* Which cell to compare with: three lists, and the two that are asked for most. */
  const picker = (number, beside) => {
    const square = data.squares[number], [model, attack, defense] = square.at;
    const list = (label, axis, chosen) => make("select", {"aria-label": label}, ...data[axis].map((one, index) =>
      make("option", {value: index, selected: index === chosen}, axis === "models" ? one.name : nameOf(axis, index))));
    const start = beside === null ? square.at : data.squares[beside].at;
    const lists = [list("model of the other cell", "models", start[0]), list("attack of the other cell", "attacks", start[1]), list("defense of the other cell", "defenses", start[2])];
    const status = make("span", {class: "ci", role: "status"});
    const go = make("button", {type: "button", id: "compare"}, "Compare");
    const to = (other) => { if (other < 0 || other === number) status.textContent = other < 0 ? "That cell was not planned." : "That is this cell."; else show(number, other); };
    go.addEventListener("click", () => to(find(square.task, ...lists.map((one) => Number(one.value)))));
    const short = (text, other) => {
      if (other < 0 || other === number) return null;
      const button = make("button", {type: "button"}, text);
      button.addEventListener("click", () => show(number, other));
      return button;
    };
    const none = (axis) => data[axis].findIndex((one) => one.name === "none");
    const alone = make("button", {type: "button"}, "A alone");
    alone.addEventListener("click", () => show(number, null));
    const only = make("label", {}, make("input", {type: "checkbox", id: "differing"}), " only other verdicts");
    only.firstChild.addEventListener("change", (event) => at("cell-body").classList.toggle("differing", event.target.checked));
    return make("div", {class: "controls compare"}, make("b", {}, "Compare with"), short("undefended", find(square.task, model, attack, none("defenses"))),
      short("without the attack", find(square.task, model, none("attacks"), defense)), ...lists, go, ...(beside === null ? [] : [alone, only]), status);
  };

  const about = (number, letter) => {
    const square = data.squares[number];
    const parts = [...(letter ? [make("b", {}, letter), make("span", {}, placeOf(square))] : []), ...flags(square)];
    if (square.sample) parts.push(make("span", {class: "ci"}, "prompts of seed " + square.sample.seed + (square.seeds > 1 ? ", one of " + square.seeds : "")));
    return make("p", {class: "about"}, ...parts.flatMap((part) => [part, " "]));
  };
  const rest = (numbers) => {
    const cells = numbers.map((number) => data.squares[number].sample).filter(Boolean).map((sample) => "'" + sample.cell.replaceAll("'", "''") + "'");
    return cells.length ? make("p", {class: "ci"}, "The rest is beside this page: ", make("code", {}, "FROM 'generations/*.parquet' WHERE cell IN (" + cells.join(", ") + ")"), " (DuckDB)") : null;
  };

  const show = (number, beside) => {
    const square = data.squares[number], body = at("cell-body");
    at("cell-title").textContent = beside === null ? placeOf(square) : "Two cells, prompt by prompt";
    body.classList.remove("differing");
    const errors = [number, ...(beside === null ? [] : [beside])].flatMap((one) => data.squares[one].errors).map((error) => make("pre", {class: "error"}, error));
    const numbers = beside === null ? [number] : [number, beside];
    const open = make("button", {type: "button", id: "reveal"}, "Show all hidden completions");
    open.addEventListener("click", () => { for (const one of all("details.veil", body)) one.open = true; });
    body.replaceChildren(...(beside === null ? [about(number, "")] : [about(number, "A"), about(beside, "B")]), ...errors, metrics(numbers), picker(number, beside));
    const turns = beside === null ? single(number) : pair(number, beside);
    body.append(make("h3", {}, "Prompts ", make("small", {}, "model output, shown as text")), ...(turns.length ? turns : [make("p", {class: "none"}, "No text of this cell is in the results.")]));
    if (body.querySelector("details.veil")) body.querySelector("h3").append(" ", open);
    body.append(...[rest(numbers)].filter(Boolean));
    addExports(body);
    if (!dialog.open) { opener = document.activeElement; dialog.showModal(); }
    dialog.scrollTop = 0;
    at("cell-title").focus();
  };
  at("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => { at("cell-body").replaceChildren(); if (opener && opener.isConnected) opener.focus(); });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-open]");
    if (button) show(Number(button.dataset.open), Number(button.dataset.beside));
  });
  return (number) => show(number, null);
})();
