/* The browser's half of the explorer: header and address, figures, CSV downloads, light and dark. Sends nothing anywhere. */
"use strict";

(() => {
  const KEYS = ["run", "layer", "method", "ratio", "flops_ratio"];

  // -- light and dark --------------------------------------------------------------------------------------------------------------

  const SHADE = "explorer-shade";
  const dark = () => document.body.classList.contains("dark");
  const asked = new URLSearchParams(location.search).get("__theme");

  function shade(value) {
    document.body.classList.toggle("dark", value === "dark");
    document.documentElement.style.colorScheme = value;
  }

  function startShade() {
    const kept = asked || localStorage.getItem(SHADE);
    if (kept === "dark" || kept === "light") shade(kept);
    new MutationObserver(redrawAll).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  }

  // -- header ----------------------------------------------------------------------------------------------------------------------

  /* The header carries the view's query: keep the address equal to it, so that the view can be shared and survives a reload. */
  function head({ element, watch }) {
    let opened = false;
    const follow = () => {
      const bar = element.querySelector(".head");
      if (!bar) return;
      opened ||= bar.dataset.query !== "";  // before, the address has not been read yet; later, no query means that the run is gone
      const wanted = new URLSearchParams(bar.dataset.query);
      const query = new URLSearchParams(location.search);
      if (opened) {
        KEYS.forEach(key => (wanted.has(key) ? query.set(key, wanted.get(key)) : query.delete(key)));
        const address = location.pathname + (query.size ? `?${query}` : "");
        if (address !== location.pathname + location.search) history.replaceState(history.state, "", address);
      }
      document.title = bar.dataset.title;
    };
    element.addEventListener("click", event => {
      if (!event.target.closest(".shade")) return;
      const value = dark() ? "light" : "dark";
      localStorage.setItem(SHADE, value);
      shade(value);
    });
    follow();
    watch("value", follow);
  }

  // -- figures ---------------------------------------------------------------------------------------------------------------------

  const figures = new Set();
  const token = name => getComputedStyle(document.querySelector(".gradio-container") || document.body).getPropertyValue(name).trim();

  /* What every figure has in common, in the colours of the page. */
  function template() {
    const text = token("--body-text-color"), quiet = token("--body-text-color-subdued"), line = token("--border-color-primary");
    const font = { family: token("--font") || "system-ui", size: 14, color: text };
    const axis = {
      gridcolor: line, linecolor: line, zerolinecolor: line, tickcolor: line, tickfont: { color: quiet },
      title: { font: { color: quiet, size: 14 } }, automargin: true, minorloglabels: "none",
    };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font,
        xaxis: axis, yaxis: axis, hoverlabel: { bgcolor: token("--background-fill-secondary"), bordercolor: line, font },
        legend: { orientation: "h", yanchor: "bottom", y: 1.02, x: 0, font },
        coloraxis: { colorbar: { outlinewidth: 0, thickness: 12, tickfont: { color: quiet } } },
        colorway: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"],
        margin: { l: 8, r: 8, t: 16, b: 8 },
      },
      data: { heatmap: [{ colorbar: { outlinewidth: 0, thickness: 12, tickfont: { color: quiet } } }] },
    };
  }

  const LETTER = 8, NARROW = 480, RESIZED = 24;
  /* Numbers in the cells of a heatmap only where they have room: on a small screen the colours speak alone. */
  function fitted(trace, width) {
    if (trace.type !== "heatmap" || !trace.texttemplate) return trace;
    const rows = Array.isArray(trace.text) ? trace.text : [["0.00 "]];
    const longest = Math.max(...rows.flat().map(text => String(text).length)), columns = trace.x ? trace.x.length : rows[0].length;
    return (width - 110) / columns < longest * LETTER ? { ...trace, texttemplate: "" } : trace;
  }

  const DASHES = { dot: "2 3", dash: "7 4", longdash: "11 4", dashdot: "7 3 2 3" };
  const GLYPHS = {
    circle: "●", square: "■", diamond: "◆", "triangle-up": "▲", cross: "✚", x: "✖", star: "★", pentagon: "⬟",
    "circle-open": "○", "square-open": "□", "diamond-open": "◇", "triangle-up-open": "△",
    hexagon: "⬢", "triangle-down": "▼", hourglass: "⧗", "hourglass-open": "⧖", bowtie: "⧓",
  };

  /* A legend that wraps: plotly's own takes one line for each name on a small screen, and with them half of the drawing. */
  function named(traces) {
    const shown = traces.filter(trace => trace.name && trace.showlegend !== false && trace.type !== "heatmap");
    if (shown.length < 2) return [];
    return shown.map(trace => {
      const color = trace.line?.color || trace.marker?.color || token("--body-text-color"), dash = DASHES[trace.line?.dash] || "";
      const bar = trace.type === "bar", line = `<line x1="0" y1="6" x2="24" y2="6" stroke="${color}" stroke-width="2" stroke-dasharray="${dash}"/>`;
      const mark = make("svg-mark", { ariaHidden: "true" });
      mark.innerHTML = `<svg width="24" height="12">${bar ? `<rect width="12" height="12" x="6" fill="${color}"/>` : line}</svg>`;
      const symbol = (trace.mode || "").includes("markers") ? GLYPHS[trace.marker?.symbol] || "●" : "";
      if (symbol) mark.append(make("span", { textContent: symbol, style: `color:${color}` }));
      return make("span", { className: "figure-name" }, mark, document.createTextNode(trace.name));
    });
  }

  function redrawAll() {
    for (const figure of figures) {
      if (figure.element.isConnected) figure.draw();
      else figures.delete(figure);
    }
  }

  function make(tag, properties = {}, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  /* One figure: see pages/components/figure.py for what its value holds. */
  function figure({ element, props, trigger, watch }) {
    const own = { element, draw };
    let cursor = null;

    function parts() {
      const frame = element.querySelector(".figure");
      if (!frame) return null;
      if (!frame.querySelector(".plot")) {
        const plot = make("div", { className: "plot" });
        plot.style.height = `${frame.dataset.height}px`;
        const summary = make("summary", { textContent: "Show data" });
        const data = make("details", { className: "figure-data" }, summary, make("div", { className: "figure-rows" }));
        const button = make("button", { type: "button", className: "quiet", textContent: "CSV" });
        button.setAttribute("aria-label", `Download as CSV: ${frame.dataset.label}`);
        button.addEventListener("click", () => own.data && save(own.data.name, own.data.columns, own.data.rows));
        data.addEventListener("toggle", () => data.open && fill(data, own.data));
        frame.append(make("div", { className: "figure-legend" }), plot, make("figcaption"), make("div", { className: "figure-tools" }, data, button));
        frame.append(make("p", { className: "unseen", ariaLive: "polite" }));
        new ResizeObserver(() => own.data && Math.abs(plot.clientWidth - own.width) > RESIZED && draw()).observe(frame);
      }
      return frame;
    }

    function draw() {
      const frame = parts();
      if (!frame || !props.value) return;
      const data = JSON.parse(props.value), plot = frame.querySelector(".plot"), tools = frame.querySelector(".figure-tools");
      frame.classList.toggle("is-empty", "empty" in data);
      if ("empty" in data) {
        if (plot.bound) window.Plotly.purge(plot), (plot.bound = false);
        own.data = null;
        plot.replaceChildren(
          make("div", { className: "empty" }, make("p", { className: "empty-title", textContent: data.empty }), make("p", { textContent: data.advice })),
        );
        frame.querySelector("figcaption").textContent = "";
        tools.hidden = true;
        return;
      }
      if (!window.Plotly) return setTimeout(draw, 60);
      own.data = data;
      own.width = plot.clientWidth;
      tools.hidden = false;
      frame.querySelector("figcaption").textContent = data.caption;
      const details = frame.querySelector("details");
      if (details.open) fill(details, data);
      if (!plot.bound) plot.replaceChildren();
      const layout = { ...data.figure.layout, template: template(), autosize: true, height: Number(frame.dataset.height) };
      const traces = data.figure.data.map(trace => fitted(trace, plot.clientWidth));
      const legend = frame.querySelector(".figure-legend"), narrow = plot.clientWidth < NARROW;
      legend.replaceChildren(...(narrow ? named(traces) : []));
      if (narrow) Object.assign(layout, { showlegend: false, height: layout.height - legend.offsetHeight });
      plot.style.height = `${layout.height}px`;
      window.Plotly.react(plot, traces, layout, { responsive: true, displaylogo: false, displayModeBar: false }).then(() => {
        keepClips(plot);
        bind(frame, plot);
      });
    }

    /* Plotly names its clips by the page's address (Gradio sets a base); ours changes with the view, and they would be lost. */
    function keepClips(plot) {
      plot._context._baseUrl = "";
      for (const node of plot.querySelectorAll("[clip-path]")) node.setAttribute("clip-path", `url(#${node.getAttribute("clip-path").match(/#([^'")]+)/)[1]})`);
    }

    function bind(frame, plot) {
      if (plot.bound) return;
      plot.bound = true;
      const clicks = frame.dataset.clicks === "1";
      plot.tabIndex = 0;
      plot.setAttribute("role", clicks ? "application" : "img");
      const keys = clicks ? "Arrow keys move from point to point, Enter chooses." : "The data follow as a table.";
      plot.setAttribute("aria-label", `${frame.dataset.label}. ${keys}`);
      if (!clicks) return;
      plot.classList.add("clicks");
      plot.on("plotly_click", event => choose(event.points[0]));
      plot.addEventListener("keydown", event => move(event, frame, plot));
      plot.addEventListener("blur", () => window.Plotly.Fx.unhover(plot));
    }

    function choose(point) {
      trigger("select", {
        index: [point.x, point.y],
        value: { z: point.z ?? null, trace: point.data.name || String(point.curveNumber), custom: point.customdata ?? null },
      });
    }

    /* The point under the cursor of the keyboard, in the form that plotly reports clicks in. */
    function pointAt(plot) {
      const trace = plot.data[cursor.trace];
      if (trace.type === "heatmap") {
        const rows = plot._fullData[cursor.trace].z, row = rows[cursor.row];
        const x = trace.x ? trace.x[cursor.column] : cursor.column, y = trace.y ? trace.y[cursor.row] : cursor.row;
        return { x, y, z: row[cursor.column], data: trace, curveNumber: cursor.trace, customdata: trace.customdata?.[cursor.row]?.[cursor.column] };
      }
      const full = plot._fullData[cursor.trace], at = cursor.column;
      return { x: full.x[at], y: full.y[at], data: trace, curveNumber: cursor.trace, customdata: trace.customdata?.[at] };
    }

    function move(event, frame, plot) {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }[event.key];
      if (event.key === "Enter" && cursor) {
        event.preventDefault();
        return choose(pointAt(plot));
      }
      if (!step) return;
      event.preventDefault();
      const traces = plot._fullData.map((trace, index) => index).filter(index => plot._fullData[index].visible === true);
      if (!cursor || !traces.includes(cursor.trace)) cursor = { trace: traces[0], row: 0, column: 0 };
      else if (plot._fullData[cursor.trace].type === "heatmap") {
        const z = plot._fullData[cursor.trace].z, range = plot._fullLayout.yaxis.range, down = range[0] > range[1] ? -1 : 1;
        cursor.row = Math.min(Math.max(cursor.row + down * step[0], 0), z.length - 1);
        cursor.column = Math.min(Math.max(cursor.column + step[1], 0), z[cursor.row].length - 1);
      } else {
        cursor.trace = traces[(traces.indexOf(cursor.trace) + step[0] + traces.length) % traces.length];
        cursor.column = Math.min(Math.max(cursor.column + step[1], 0), plot._fullData[cursor.trace].x.length - 1);
      }
      const point = pointAt(plot), heat = plot._fullData[cursor.trace].type === "heatmap";
      const where = heat ? { xval: point.x, yval: point.y, curveNumber: cursor.trace } : { curveNumber: cursor.trace, pointNumber: cursor.column };
      window.Plotly.Fx.hover(plot, [where], ["xy"]);
      frame.querySelector(".unseen").textContent = `${point.x}, ${point.y}${point.z === undefined ? "" : `: ${Number(point.z).toPrecision(3)}`}`;
    }

    figures.add(own);
    draw();
    watch("value", draw);
  }

  const SHOWN_ROWS = 500;

  function fill(details, data) {
    if (!data) return;
    const cell = (tag, value) => {
      const number = typeof value === "number";
      const text = number && !Number.isInteger(value) ? Number(value.toPrecision(5)).toString() : value ?? "–";
      return make(tag, { textContent: text, className: number ? "number" : "" });
    };
    const head = make("tr", {}, ...data.columns.map(name => make("th", { textContent: name, scope: "col" })));
    const rows = data.rows.slice(0, SHOWN_ROWS).map(row => make("tr", {}, ...row.map(value => cell("td", value))));
    const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
    const box = make("div", { className: "table-scroll", tabIndex: 0, role: "region", ariaLabel: "Data of the figure" }, table);
    box.style.maxHeight = "320px";
    const rest = data.rows.length - SHOWN_ROWS;
    details.querySelector(".figure-rows").replaceChildren(box, ...(rest > 0 ? [make("p", { textContent: `${rest} more rows are in the CSV.` })] : []));
  }

  // -- CSV -------------------------------------------------------------------------------------------------------------------------

  /* Text that a spreadsheet would take for a formula gets a quote in front. */
  function quoted(value) {
    if (value === null || value === undefined) return "";
    let text = String(value);
    if (/^[=+@\t\r]|^-(?![\d.])/.test(text)) text = `'${text}`;
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function save(name, columns, rows) {
    const lines = [columns, ...rows].map(row => row.map(quoted).join(","));
    const address = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
    make("a", { href: address, download: `${name}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  }

  document.addEventListener("click", event => {
    const button = event.target.closest("button[data-csv]");
    if (!button) return;
    const table = button.closest(".table-box").querySelector("table");
    const told = row => [...row.cells].filter(cell => !cell.classList.contains("press"));
    const columns = told(table.tHead.rows[0]).map(cell => cell.textContent);
    save(button.dataset.csv, columns, [...table.tBodies[0].rows].map(row => told(row).map(cell => cell.dataset.value ?? cell.textContent)));
  });

  // -- buttons in rows -------------------------------------------------------------------------------------------------------------

  /* A table whose rows have buttons, drawn again and again: see pages/components/tables.py. */
  function presses({ element, trigger }) {
    element.addEventListener("click", event => {
      const button = event.target.closest("button[data-row]");
      if (button) trigger("select", { index: 0, value: button.dataset.row });
    });
  }

  // -- keys ------------------------------------------------------------------------------------------------------------------------

  /* Arrow keys choose among radio buttons, as people expect; Gradio gives each of them a name of its own, and the browser sees no group. */
  document.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || event.target.type !== "radio") return;
    const group = [...(event.target.closest("fieldset")?.querySelectorAll("input[type=radio]:not(:disabled)") ?? [event.target])];
    const next = group[(group.indexOf(event.target) + step + group.length) % group.length];
    event.preventDefault();
    next.focus();
    next.click();
  });

  window.explorer = { head, figure, presses, save, make, token, dark };
  if (document.body) startShade();
  else document.addEventListener("DOMContentLoaded", startShade);
})();
