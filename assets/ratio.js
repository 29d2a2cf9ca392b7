/* The Ratio page in the browser: the slider looks plans up in a table that was sent once; dragging it asks nobody.

   Three components share one stage: "control" (slider, figures; its value brings the tables), "map" (experts and layers at this ratio) and
   "retained" (layers at every ratio). What a table holds: pages/components/plan_table.py. */
"use strict";

(() => {
  const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
  const CHANGE = ["#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f"];
  const WHOLE = 255, DENSE_RANK = 65535, SIDES = 2;
  const SETTLE = 450; // ms after the last key press until the ratio counts as chosen
  const GLIDE = 260; // ms in which the map moves to another method's plan
  const TEXT = 14;
  const FEW = 1024; // cells up to which each is drawn as a vessel
  const WIDE = 32; // experts from which the map takes the whole width

  // -- tables ------------------------------------------------------------------------------------------------------------------------

  const ARRAYS = { "|u1": Uint8Array, "<u2": Uint16Array, "<f4": Float32Array, "<f8": Float64Array };

  let tables = 0;

  async function unpack(text) {
    const packed = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const data = await new Response(stream).arrayBuffer();
    const size = new DataView(data).getUint32(0, true);
    const table = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size)));
    let start = 4 + size;
    for (const [name, type, shape] of table.arrays) {
      const bytes = shape.reduce((product, each) => product * each, ARRAYS[type].BYTES_PER_ELEMENT);
      table[name] = new ARRAYS[type](data.slice(start, start + bytes)); // a copy, because views must be aligned
      start += bytes;
    }
    table.number = ++tables;
    table.widest = Math.max(...table.experts);
    table.busiest = table.load.reduce((most, each) => Math.max(most, each), 0);
    return table;
  }

  /* Place of the plan for a whole percent; the largest that there is for more. */
  const placeOf = (table, percent) => Math.min(Math.max(percent, 0), table.asked.length - 1);
  /* Predicted losses by the law that measured plans tell (planning/loss_law.py): of each layer cut alone, and of all together. */
  function fitted(table, law) {
    if (!law) return table;
    const count = table.layers.length, factors = table.layers.map(layer => law.factor * (law.layers[layer] ?? 1));
    const together = losses => losses.reduce((total, loss) => total + loss ** (1 / law.together), 0) ** law.together;
    table.law = law;
    table.loss = table.loss.map((loss, cell) => factors[cell % count] * Math.max(loss, 0) ** law.power);
    table.totals.predicted_loss = table.asked.map((_, place) => together(table.loss.subarray(place * count, (place + 1) * count)));
    return table;
  }

  const nameOf = (method, saved) => (saved ? `${method}, ${saved} % fewer operations` : method);
  const at = (table, place, layer) => place * table.layers.length + layer;
  const keptOf = (table, place, layer) => table.stored[at(table, place, layer)] / table.original_layer[layer];

  // -- words -------------------------------------------------------------------------------------------------------------------------

  const three = value => (Math.abs(value) >= 99.95 ? value.toFixed(0) : Math.abs(value) >= 9.995 ? value.toFixed(1) : value.toFixed(2));

  function scaled(value, units) {
    const unit = units.find(([size]) => Math.abs(value) >= 0.9995 * size); // what three digits round up to 1 of it
    return unit ? `${three(value / unit[0])} ${unit[1]}` : value.toFixed(0);
  }

  const bytes = value => scaled(value, [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [0, "B"]]);
  const count = value => scaled(value, [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]]);
  const share = (value, digits = 0) => `${(100 * value).toFixed(digits)} %`;
  const sentence = text => text[0].toUpperCase() + text.slice(1);
  const saving = value => (Math.round(100 * value) < 0 ? `${share(-value)} more` : `${share(Math.abs(value))} saved`);
  const signed = (value, show) => `${value < 0 ? "−" : "+"}${show(Math.abs(value))}`;

  function nats(value) {
    if (value === 0) return "0";
    if (value < 5e-5) {
      const [digits, exponent] = value.toExponential(1).split("e-");
      return `${digits} · 10⁻${[...exponent].map(digit => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("")}`;
    }
    return value.toPrecision(2).includes("e") ? value.toFixed(5) : Number(value.toPrecision(3)).toString();
  }

  function sideText(table, place, layer, side) {
    const cell = at(table, place, layer) * SIDES + side, state = table.states[table.state[cell]];
    if (state === "dense") return "dense";
    const [low, middle, high] = table.rank.subarray(3 * cell, 3 * cell + 3);
    if (middle === 0 && high === DENSE_RANK) { // experts stay or go as a whole
      const start = at(table, place, layer) * table.widest, own = table.kept.subarray(start, start + table.experts[layer]);
      return `${state}\n${own.filter(kept => kept === WHOLE).length} of ${own.length}`;
    }
    const rank = each => (each === DENSE_RANK ? "full" : String(each));
    return `${state}\n${low === high ? rank(low) : [low, middle, high].map(rank).join(" · ")}`;
  }

  // -- colours -----------------------------------------------------------------------------------------------------------------------

  function ramp(anchors) {
    const parts = anchors.map(color => [1, 3, 5].map(start => parseInt(color.slice(start, start + 2), 16)));
    return Array.from({ length: 256 }, (_, index) => {
      const spot = (index / 255) * (parts.length - 1), low = Math.min(Math.floor(spot), parts.length - 2);
      return parts[low].map((each, channel) => Math.round(each + (spot - low) * (parts[low + 1][channel] - each)));
    });
  }

  const PARTS = ramp(CIVIDIS), CHANGE_PARTS = ramp(CHANGE);
  const [MAGNITUDES, CHANGES] = [PARTS, CHANGE_PARTS].map(parts => parts.map(mixed => `rgb(${mixed.join(",")})`));

  let inks = null;

  function ink() {
    const { token, dark } = window.explorer;
    if (inks?.dark === dark()) return inks;
    return (inks = {
      dark: dark(),
      text: token("--body-text-color"), quiet: token("--body-text-color-subdued"), line: token("--border-color-primary"),
      ground: token("--background-fill-primary"), empty: token("--background-fill-secondary"), accent: token("--link-text-color"),
      font: `${TEXT}px ${token("--font") || "system-ui"}`,
    });
  }

  // -- canvases ----------------------------------------------------------------------------------------------------------------------

  /* A canvas of so many CSS pixels, sharp on this screen; clears it. */
  function prepared(canvas, width, height) {
    const scale = window.devicePixelRatio || 1, wide = Math.round(width * scale), high = Math.round(height * scale);
    if (canvas.width !== wide || canvas.height !== high) {
      Object.assign(canvas, { width: wide, height: high });
      canvas.style.height = `${height}px`;
    }
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    return context;
  }

  const edges = (start, size, parts) => Array.from({ length: parts + 1 }, (_, index) => Math.round(start + (size * index) / parts));

  /* Which of many labels fit at a distance of `least` pixels. */
  const STEPS = [1, 2, 4, 5, 8, 10, 16, 20, 32, 40, 50, 64, 100, 128];
  const every = (size, parts, least) => STEPS.find(step => (size / parts) * step >= least) || parts;

  function plate(table, canvas) {
    const width = canvas.clientWidth, left = 34, top = 24, rows = table.layers.length;
    const high = Math.min(Math.max(Math.round((table.widest > WIDE ? 600 : 480) / rows), 6), 56);
    return {
      width, height: top + high * rows + 2, left, top, high,
      x: edges(left, width - left - 1, table.widest), y: edges(top, high * rows, rows),
    };
  }

  function labels(context, colors, table, frame) {
    context.font = colors.font;
    context.fillStyle = colors.quiet;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const rows = every(frame.high * table.layers.length, table.layers.length, 18);
    table.layers.forEach((layer, row) => row % rows || context.fillText(String(layer), frame.left - 10, (frame.y[row] + frame.y[row + 1]) / 2));
    context.textAlign = "center";
    const columns = every(frame.width - frame.left, table.widest, 30);
    for (let expert = 0; expert < table.widest; expert += columns) {
      context.fillText(String(expert), (frame.x[expert] + frame.x[expert + 1]) / 2, frame.top - 12);
    }
  }

  /* What does not change while the slider moves is drawn once, and again when size, table or shade have changed. */
  const drawings = new WeakMap();

  function backdrop(canvas, key, width, height, draw) {
    const known = drawings.get(canvas);
    if (known?.key === key) return known.drawing;
    const drawing = document.createElement("canvas");
    draw(prepared(drawing, width, height));
    drawings.set(canvas, { key, drawing });
    return drawing;
  }

  const keyOf = (table, frame, colors) => [table.number, frame.width, frame.height, colors.text, window.devicePixelRatio].join();

  /* The expert map. A large cell is a vessel: how full it stands and its colour both say the share that is kept. Of many small cells the
     colour alone does. The thin bar under a cell is its load. */
  function drawMap(canvas, table, kept, pinned, chosen) {
    const frame = plate(table, canvas);
    if (frame.width < 80) return;
    const context = prepared(canvas, frame.width, frame.height), colors = ink();
    const most = pinned ? widestChange(kept, pinned) : WHOLE;
    const tone = pinned ? cell => (kept[cell] - pinned[cell]) / most : cell => kept[cell];
    if (table.layers.length * table.widest > FEW || frame.high < 16) drawTiles(context, canvas, table, frame, colors, tone, Boolean(pinned));
    else drawVessels(context, canvas, table, frame, colors, tone, Boolean(pinned));
    if (chosen >= 0) {
      context.strokeStyle = colors.accent;
      context.lineWidth = 2;
      context.strokeRect(frame.left - 1, frame.y[chosen], frame.width - frame.left - 1, frame.high);
    }
  }

  function drawVessels(context, canvas, table, frame, colors, tone, changes) {
    const gap = (frame.width - frame.left) / table.widest < 16 ? 1 : 3, bar = 4, inner = frame.high - gap - bar - 2;
    const place = (row, expert) => [frame.x[expert] + (gap >> 1), frame.y[row] + (gap >> 1), frame.x[expert + 1] - frame.x[expert] - gap];
    const back = backdrop(canvas, keyOf(table, frame, colors), frame.width, frame.height, still => {
      labels(still, colors, table, frame);
      eachCell(table, (row, expert, cell) => {
        const [left, top, width] = place(row, expert);
        still.fillStyle = colors.empty;
        still.fillRect(left, top, width, inner);
        still.strokeStyle = colors.line;
        still.strokeRect(left + 0.5, top + 0.5, width - 1, inner - 1);
        if (table.busiest) drawLoad(still, colors, left, top + inner + 2, width, bar, table.load[cell] / table.busiest);
      });
    });
    context.drawImage(back, 0, 0, frame.width, frame.height);
    eachCell(table, (row, expert, cell) => {
      const [left, top, width] = place(row, expert), value = tone(cell);
      if (!value) return;
      const level = changes ? Math.max(1, (inner / 2) * Math.abs(value)) : Math.max(2, Math.round((inner * value) / WHOLE));
      context.fillStyle = changes ? CHANGES[changeTone(value)] : MAGNITUDES[Math.round(value)];
      context.fillRect(left, changes ? top + inner / 2 - (value > 0 ? level : 0) : top + inner - level, width, level);
    });
  }

  const tiles = document.createElement("canvas");

  function drawTiles(context, canvas, table, frame, colors, tone, changes) {
    const rows = table.layers.length, wide = (frame.width - frame.left) / table.widest;
    Object.assign(tiles, { width: table.widest, height: rows });
    const image = new ImageData(table.widest, rows);
    eachCell(table, (row, expert, cell) => {
      const value = tone(cell);
      if (!value) return;
      const [red, green, blue] = changes ? CHANGE_PARTS[changeTone(value)] : PARTS[Math.round(value)], start = 4 * (row * table.widest + expert);
      image.data[start] = red;
      image.data[start + 1] = green;
      image.data[start + 2] = blue;
      image.data[start + 3] = 255;
    });
    tiles.getContext("2d").putImageData(image, 0, 0);
    const right = frame.x[table.widest], bottom = frame.y[rows], gap = wide < 5 ? 0 : 1, bar = frame.high < 10 ? 1 : 2;
    context.fillStyle = colors.empty;
    context.fillRect(frame.left, frame.top, right - frame.left, bottom - frame.top);
    context.imageSmoothingEnabled = false;
    context.drawImage(tiles, frame.left, frame.top, right - frame.left, bottom - frame.top);
    const front = backdrop(canvas, keyOf(table, frame, colors), frame.width, frame.height, still => {
      labels(still, colors, table, frame);
      still.fillStyle = colors.ground;
      for (const x of gap ? frame.x : []) still.fillRect(x - 1, frame.top, 1, bottom - frame.top);
      for (const y of frame.y) still.fillRect(frame.left, y - 1 - bar, right - frame.left, 1 + bar);
      eachCell(table, (row, expert, cell) => {
        const width = frame.x[expert + 1] - frame.x[expert] - gap;
        if (table.busiest) drawLoad(still, colors, frame.x[expert], frame.y[row + 1] - 1 - bar, width, bar, table.load[cell] / table.busiest);
      });
    });
    context.drawImage(front, 0, 0, frame.width, frame.height);
  }

  function eachCell(table, visit) {
    for (let row = 0; row < table.layers.length; row++) {
      for (let expert = 0; expert < table.experts[row]; expert++) visit(row, expert, row * table.widest + expert);
    }
  }

  function drawLoad(context, colors, left, top, width, height, share) {
    context.fillStyle = colors.line;
    context.fillRect(left, top, width, height);
    context.fillStyle = colors.quiet;
    context.fillRect(left, top, width * share, height);
  }

  /* The largest difference between two plans, at least a tenth of an expert: the end of the colour scale. */
  const widestChange = (kept, pinned) => kept.reduce((most, value, cell) => Math.max(most, Math.abs(value - pinned[cell])), WHOLE / 10);

  /* Place of a change in [-1, 1] among the colours; the smallest still differs from none. */
  const changeTone = value => Math.round(127.5 * (1 + Math.sign(value) * (0.25 + 0.75 * Math.abs(value))));

  const RETAINED = { left: 52, top: 24, right: 14, high: 4, lit: 18 };

  /* Share that each layer keeps at every ratio, the plan of the slider magnified. */
  function drawRetained(canvas, table, place, chosen) {
    const width = canvas.clientWidth, rows = table.asked.length, columns = table.layers.length;
    if (width < 80) return;
    const { left, top, high, lit } = RETAINED, height = top + high * 81 + lit + 8, colors = ink(), context = prepared(canvas, width, height);
    const x = edges(left, width - left - RETAINED.right, columns), span = x[columns] - left;
    const back = backdrop(canvas, keyOf(table, { width, height }, colors), width, high * rows, still => {
      for (let row = 0; row < rows; row++) {
        for (let column = 0; column < columns; column++) {
          still.fillStyle = MAGNITUDES[Math.round(WHOLE * keptOf(table, row, column))];
          still.fillRect(x[column], high * row, x[column + 1] - x[column], high);
        }
      }
    });
    const scale = window.devicePixelRatio || 1;
    const slice = (from, count, y, tall) =>
      count && context.drawImage(back, left * scale, from * high * scale, span * scale, count * high * scale, left, y, span, tall);
    const litTop = top + place * high + 2;
    context.imageSmoothingEnabled = false;
    slice(0, place, top, place * high);
    slice(place, 1, litTop, lit);
    slice(place + 1, rows - place - 1, litTop + lit + 2, (rows - place - 1) * high);
    context.strokeStyle = colors.text;
    context.lineWidth = 2;
    context.strokeRect(left - 1, litTop - 1, span + 2, lit + 2);
    context.font = colors.font;
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (let row = 0; row < rows; row++) {
      if (row !== place && (table.asked[row] % 20 || Math.abs(row - place) * high <= 20)) continue;
      context.fillStyle = row === place ? colors.text : colors.quiet;
      context.fillText(`${table.asked[row]} %`, left - 10, row === place ? litTop + lit / 2 : top + row * high + high / 2 + (row > place ? lit + 4 : 0));
    }
    context.textAlign = "center";
    context.fillStyle = colors.quiet;
    const step = every(width - left, columns, 30);
    for (let column = 0; column < columns; column += step) context.fillText(String(table.layers[column]), (x[column] + x[column + 1]) / 2, top - 12);
    if (chosen >= 0) {
      context.strokeStyle = colors.accent;
      context.strokeRect(x[chosen], top, x[chosen + 1] - x[chosen], high * rows + lit);
    }
  }

  /* Place of the plan under a point of the retained map. */
  function retainedPlace(table, place, y) {
    const { top, high, lit } = RETAINED, before = top + place * high, tall = lit + 4;
    const offset = y < before ? y : y < before + tall ? before : y - tall + high;
    return Math.min(Math.max(Math.floor((offset - top) / high), 0), table.asked.length - 1);
  }

  // -- the stage ---------------------------------------------------------------------------------------------------------------------

  const stages = new WeakMap(); // one a page
  const stageOf = element => {
    const page = element.closest(".gradio-container") || document.body;
    if (!stages.has(page)) stages.set(page, new Stage());
    return stages.get(page);
  };

  class Stage {
    constructor() {
      this.regions = {};
      this.tables = new Map();
      this.run = null;
      this.method = "";
      this.saved = 0; // percent of the operations that every plan saves at least
      this.planning = false;
      this.percent = 40;
      this.chosen = -1;
      this.pin = null;
      this.shown = null;
      this.asked = 0;
      this.turn = 0;
      this.mark = this.mark.bind(this);
      new MutationObserver(() => this.ask()).observe(document.body, { attributes: true, attributeFilter: ["class"] });
    }

    get table() {
      return this.tables.get(this.name);
    }

    /* What the plans are made by: the method, and what is saved of the operations. */
    get name() {
      return nameOf(this.method, this.saved);
    }

    get place() {
      return placeOf(this.table, this.percent);
    }

    part(region, name) {
      return this.regions[region]?.querySelector(`[data-part="${name}"]`);
    }

    attach(name, element) {
      this.regions[name] = element;
      new ResizeObserver(() => this.ask()).observe(element);
      this.ask();
    }

    /* What the server sent: the view, and the table of its method (null where the run holds none). */
    async receive(data) {
      if (data.run !== this.run) {
        this.tables.clear();
        Object.assign(this, { run: data.run, pin: null, shown: null, percent: data.percent, chosen: -1 });
      }
      const turn = ++this.turn;
      if (data.table) {
        const table = fitted(await unpack(data.table), data.law);
        if (turn !== this.turn) return; // another method was chosen meanwhile
        this.tables.set(nameOf(data.method, data.flops), table);
      }
      Object.assign(this, { method: data.method, saved: data.flops, bound: data, planning: false });
      this.empty = data.empty;
      if (this.table) this.percent = this.table.asked[this.place]; // the view asks for no more than its method reaches either
      if (this.table && data.layer !== null) this.chosen = this.table.layers.indexOf(data.layer);
      this.glide();
      this.ask();
    }

    /* Move from what the map shows to the plan, unless the person wants no motion. */
    glide() {
      const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
      if (still || !this.table || !this.shown || this.shown.length !== this.cells().length) return;
      this.from = Float32Array.from(this.shown);
      this.since = performance.now();
    }

    cells(table = this.table, place = this.place) {
      const size = table.layers.length * table.widest;
      return table.kept.subarray(place * size, (place + 1) * size);
    }

    choose(percent) {
      this.percent = percent;
      this.from = null;
      this.ask();
    }

    /* Paint before the next frame, once. */
    ask() {
      if (this.asked) return;
      this.asked = requestAnimationFrame(now => {
        this.asked = 0;
        this.paint(now);
      });
    }

    paint(now) {
      const table = this.table;
      for (const region of Object.values(this.regions)) region.classList.toggle("is-empty", !table && Boolean(this.empty));
      if (!table) return this.paintEmpty();
      this.regions.map?.firstElementChild.classList.toggle("is-wide", table.widest > WIDE);
      const place = this.place, target = this.cells();
      const done = this.from ? Math.min((now - this.since) / GLIDE, 1) : 1, eased = 1 - (1 - done) ** 3;
      this.shown = done < 1 ? target.map((value, cell) => Math.round(this.from[cell] + eased * (value - this.from[cell]))) : target;
      if (done < 1) this.ask();
      else this.from = null;
      this.paintControl(table, place);
      const pinned = this.pinned();
      const map = this.part("map", "experts"), retained = this.part("retained", "layers");
      if (map) {
        drawMap(map, table, this.shown, pinned && this.cells(...pinned), this.chosen);
        this.paintLegend(pinned ? widestChange(this.shown, this.cells(...pinned)) / WHOLE : 0);
        this.paintLayers(table, place, pinned);
      }
      if (retained) drawRetained(retained, table, place, this.chosen);
      clearTimeout(this.later);
      this.later = setTimeout(() => this.tell(table, place), 150);
    }

    paintEmpty() {
      for (const name of Object.keys(this.regions)) {
        const box = this.part(name, "empty");
        if (!box || !this.empty) continue;
        box.querySelector(".empty-title").textContent = this.empty[0];
        box.querySelector("p:last-child").textContent = this.empty[1];
      }
    }

    /* The pinned plan, where it can be compared with the one shown: its table and place. */
    pinned() {
      const table = this.pin && this.tables.get(this.pin.name);
      return table && (this.pin.name !== this.name || this.pin.place !== this.place) ? [table, this.pin.place] : null;
    }

    paintControl(table, place) {
      const slider = this.part("control", "slider");
      if (!slider) return;
      const totals = name => table.totals[name][place], before = name => table.original[name];
      const write = (name, text) => set(this.part("control", name), text);
      const last = String(table.asked.length - 1);
      if (slider.max !== last) slider.max = last;
      if (slider.value !== String(place)) slider.value = String(place);
      slider.setAttribute("aria-valuetext", `${table.asked[place]} percent removed`);
      slider.style.setProperty("--reached", `${(100 * place) / (table.asked.length - 1)}%`);
      write("percent", `${table.asked[place]} %`);
      const reach = `${this.method} reaches ${share(Math.floor(1000 * table.max_ratio) / 1000, 1)}`;
      write("reach", table.max_ratio < 0.8 ? reach : "0 to 80 %, in steps of 1 %");
      const loss = totals("predicted_loss");
      write("size", bytes(totals("bytes")));
      write("loss", nats(loss));
      write("active", count(totals("active_parameters")));
      write("operations", count(totals("flops")));
      this.paintBound(totals("ratio"), table.asked[place] / 100);
      const pinned = this.pinned();
      const alone = "from calibration alone: several times too small, until three plans are measured";
      const source = table.law ? `fitted to ${table.law.points} measured plans${table.law.shared ? " of all methods" : ""}, ±\u00a0${share(table.law.error, 0)}` : alone;
      if (pinned) {
        const other = name => pinned[0].totals[name][pinned[1]];
        write("size-remark", `${signed(totals("bytes") - other("bytes"), bytes)} against the pinned plan`);
        write("loss-remark", `${signed(loss - other("predicted_loss"), nats)} against the pinned plan; ${source}`);
        write("active-remark", `${signed(totals("active_parameters") - other("active_parameters"), count)} against the pinned plan`);
        write("operations-remark", `${signed(totals("flops") - other("flops"), count)} against the pinned plan`);
      } else {
        write("size-remark", `of ${bytes(before("bytes"))}, on disk`);
        write("loss-remark", `nats a token, ${source}`);
        write("active-remark", `of ${count(before("active_parameters"))} parameters a token`);
        write("operations-remark", `of ${count(before("flops"))} a token, ${saving(1 - totals("flops") / before("flops"))}`);
      }
      const unpin = this.part("control", "unpin");
      unpin.hidden = !this.pin;
      write("pin-text", this.pin ? `Pinned: ${this.pin.name} at ${this.pin.percent} %` : "");
    }

    /* The second slider: what its plans save of the operations at least, where the method weighs them. */
    paintBound(reached, asked) {
      const slider = this.part("control", "flops"), { weighs, weighing, flopsMost: most } = this.bound;
      const value = slider.matches(":active") || this.planning || this.held ? slider.value : String(this.saved);
      Object.assign(slider, { disabled: !weighs, max: String(Math.max(most, 1)), value });
      slider.setAttribute("aria-valuetext", Number(value) ? `${value} percent saved at least` : "no bound");
      slider.style.setProperty("--reached", `${most ? (100 * value) / most : 0}%`);
      set(this.part("control", "saved"), !weighs ? "–" : Number(value) ? `${value} %` : "any");
      const more = this.saved && reached - asked > 0.005 ? `; they alone remove ${share(reached)} of the parameters` : "";
      const within = `0 to ${most} %, in steps of 1 %${more}`;
      set(this.part("control", "flops-reach"), this.planning ? "Planning every ratio anew …" : weighs ? within : `${this.method} does not weigh operations: ${weighing} do`);
    }

    /* What the colours say: shares kept, or changes of it up to `most`. */
    paintLegend(most) {
      const legend = this.part("map", "legend");
      if (!legend || legend.dataset.most === String(most)) return;
      legend.dataset.most = String(most);
      legend.querySelector("i").style.background = `linear-gradient(90deg, ${(most ? CHANGE : CIVIDIS).join(",")})`;
      const [low, high] = legend.querySelectorAll("span");
      low.textContent = most ? `keeps ${share(most)} less` : "0 % kept";
      high.textContent = most ? `${share(most)} more than the pinned plan` : "100 %, dense";
    }

    paintLayers(table, place, pinned) {
      const body = this.part("map", "rows");
      if (body.rows.length !== table.layers.length) {
        const { make } = window.explorer, cell = () => make("td", {}, make("span"), make("small"));
        const head = () => make("th", { scope: "row" }, make("button", { type: "button", className: "stage-layer" }));
        body.replaceChildren(...table.layers.map(() => make("tr", {}, head(), cell(), cell(), cell(), cell(), cell())));
        for (const each of body.rows) [3, 4].forEach(column => each.cells[column].classList.add("number"));
      }
      const box = this.part("map", "layers"), scroll = box.querySelector(".table-scroll"), open = Boolean(pinned);
      const top = scroll.scrollTop, bottom = top + scroll.clientHeight;
      const inSight = row => row.offsetTop < bottom && row.offsetTop + row.offsetHeight > top;
      const seen = [...body.rows].map(row => open || !row.cells[1].textContent || inSight(row)); // the others follow when the hand rests
      box.classList.toggle("compared", open);
      const differing = table.layers.filter((_, index) => seen[index] && this.paintRow(body.rows[index], table, place, index, pinned)).length;
      const title = open
        ? `${differing} of ${table.layers.length} layers differ from ${this.pin.name} at ${this.pin.percent} % (below, grey)`
        : `Layers, ${this.name} at ${table.asked[place]} %`;
      set(this.part("map", "layers-title"), title);
    }

    /* One row of the table of layers; says whether it differs from the pinned plan, which is shown below each figure that does. */
    paintRow(row, table, place, index, pinned) {
      const mine = this.words(table, place, index), theirs = pinned ? this.words(...pinned, index) : mine;
      const differs = mine.slice(0, 4).some((text, column) => text !== theirs[column]), hidden = Boolean(pinned) && !differs;
      if (row.hidden !== hidden) row.hidden = hidden;
      const button = row.cells[0].firstChild;
      set(button, String(table.layers[index]));
      button.setAttribute("aria-label", `Light layer ${table.layers[index]}`);
      button.setAttribute("aria-pressed", String(index === this.chosen));
      mine.forEach((text, column) => {
        const cell = row.cells[column + 1];
        set(cell.firstChild, text);
        set(cell.lastChild, column < 4 && theirs[column] !== text ? theirs[column] : "");
      });
      row.cells[3].style.setProperty("--kept", share(keptOf(table, place, index), 1).replace(" ", ""));
      row.classList.toggle("chosen", index === this.chosen);
      return differs;
    }

    /* Cells of a layer's row: input, output, kept, loss, reason. */
    words(table, place, layer) {
      const cell = at(table, place, layer);
      return [
        sideText(table, place, layer, 0), sideText(table, place, layer, 1), share(keptOf(table, place, layer), 1), nats(table.loss[cell]),
        sentence(table.reasons[table.reason[cell]].replace(/^keeps [\d.]+ %: /, "")),
      ];
    }

    /* Once the hand rests: rows out of sight, words for people who do not see the map, the place on the curve of all methods. */
    tell(table, place) {
      if (table !== this.table || place !== this.place) return;
      const pinned = this.pinned(), { bytes: sizes, predicted_loss: losses } = table.totals;
      [...(this.part("map", "rows")?.rows ?? [])].forEach((row, index) => this.paintRow(row, table, place, index, pinned));
      const words = `${table.asked[place]} % removed: ${bytes(sizes[place])}, predicted loss ${nats(losses[place])} nats a token`;
      this.part("map", "experts")?.setAttribute("aria-label", `Expert map by ${this.name}, ${words}. The table of layers says the same.`);
      set(this.part("control", "said"), words);
      this.mark();
    }

    /* A line on the curve where the slider is; drawn again whenever the curve is. */
    mark() {
      const plot = document.querySelector("#ratio-curve .plot");
      if (!this.table || !plot?.bound || !plot.layout) return;
      const size = this.table.totals.bytes[this.place] / plot.layout.meta, { quiet } = ink(), shown = plot.layout.shapes?.[0];
      plot.removeListener("plotly_afterplot", this.mark);
      plot.on("plotly_afterplot", this.mark);
      if (shown?.x0 === size && shown.line.color === quiet) return;
      const line = { color: quiet, width: 1, dash: "dot" };
      window.Plotly.relayout(plot, { shapes: [{ type: "line", xref: "x", yref: "paper", x0: size, x1: size, y0: 0, y1: 1, line }] });
    }

    /* Light a layer, or put it out again; gives its index, or null. */
    light(place) {
      this.chosen = this.chosen === place ? -1 : place;
      this.ask();
      return this.chosen < 0 ? null : this.table.layers[this.chosen];
    }
  }

  const set = (node, text) => {
    if (node && node.textContent !== text) node.textContent = text;
  };

  // -- components --------------------------------------------------------------------------------------------------------------------

  function control(stage, { element, props, trigger, watch }) {
    let waiting = 0;
    const released = () => {
      clearTimeout(waiting);
      stage.held = false;
      if (!stage.table) return;
      const flops = Number(stage.part("control", "flops").value);
      stage.planning = stage.bound.weighs && flops !== stage.saved;
      stage.ask();
      trigger("release", { percent: stage.table.asked[stage.place], flops });
    };
    stage.released = released;
    const part = event => event.target.closest("[data-part]")?.dataset.part;
    let pointing = false;
    const sliding = event => ["slider", "flops"].includes(part(event));
    element.addEventListener("pointerdown", event => sliding(event) && (pointing = true));
    element.addEventListener("input", event => {
      if (!stage.table || !sliding(event)) return;
      if (part(event) === "slider") return stage.choose(Number(event.target.value));
      stage.held = true;
      stage.ask();
    });
    element.addEventListener("change", event => {
      if (!sliding(event)) return;
      clearTimeout(waiting);
      if (pointing) released();
      else waiting = setTimeout(released, SETTLE);
      pointing = false;
    });
    element.addEventListener("click", event => {
      const name = part(event);
      if (!stage.table || (name !== "pin" && name !== "unpin")) return;
      stage.pin = name === "pin" ? { name: stage.name, place: stage.place, percent: stage.table.asked[stage.place] } : null;
      stage.ask();
    });
    const receive = () => props.value && stage.receive(JSON.parse(props.value));
    receive();
    watch("value", receive);
  }

  function map(stage, { element, trigger }) {
    const tip = stage.part("map", "tip");
    const where = event => {
      const canvas = event.target.closest('[data-part="experts"]'), table = stage.table;
      if (!canvas || !table) return null;
      const frame = plate(table, canvas), before = (edges, offset) => edges.findIndex((edge, index) => index && offset < edge) - 1;
      const row = before(frame.y, event.offsetY), column = before(frame.x, event.offsetX);
      const outside = event.offsetX < frame.left || event.offsetY < frame.top || row < 0 || column < 0;
      return outside || column >= table.experts[row] ? null : { row, column, canvas };
    };
    element.addEventListener("pointermove", event => {
      const spot = where(event);
      tip.hidden = !spot;
      if (!spot) return;
      const table = stage.table, cell = spot.row * table.widest + spot.column, kept = stage.cells()[cell], load = table.load[cell];
      const held = kept === WHOLE ? "dense" : kept === 0 ? "nothing kept" : `${share(kept / WHOLE)} kept`;
      set(tip, `Layer ${table.layers[spot.row]}, expert ${spot.column}: ${held}${table.busiest ? `, ${share(load, 1)} of tokens` : ""}`);
      const room = spot.canvas.clientWidth - tip.offsetWidth;
      tip.style.transform = `translate(${Math.max(0, Math.min(event.offsetX + 14, room))}px, ${spot.canvas.offsetTop + event.offsetY + 18}px)`;
    });
    element.addEventListener("pointerleave", () => (tip.hidden = true));
    element.addEventListener("click", event => {
      const row = where(event)?.row ?? event.target.closest(".stage-layer")?.closest("tr").sectionRowIndex;
      if (row !== undefined) return trigger("select", { layer: stage.light(row) });
      save(event, stage);
    });
  }

  function retained(stage, { element }) {
    let dragging = false;
    const move = event => stage.table && stage.choose(retainedPlace(stage.table, stage.place, event.offsetY));
    element.addEventListener("pointerdown", event => {
      if (!event.target.closest("canvas")) return;
      dragging = true;
      event.target.setPointerCapture(event.pointerId);
      move(event);
    });
    element.addEventListener("pointermove", event => dragging && move(event));
    const end = () => {
      if (dragging) stage.released?.();
      dragging = false;
    };
    element.addEventListener("pointerup", end);
    element.addEventListener("pointercancel", end);
    element.addEventListener("click", event => save(event, stage));
  }

  /* What a drawing's button downloads: the same data as a table. */
  function save(event, stage) {
    const asked = event.target.closest("button[data-save]")?.dataset.save, table = stage.table;
    if (!asked || !table) return;
    const made = stage.saved ? `${stage.method}-flops-${stage.saved}` : stage.method, place = stage.place, name = `${made}-${table.asked[place]}`;
    const tables = {
      experts: () => [`experts-${name}`, ["layer", "expert", "kept", "share of tokens"], expertRows(table, stage.cells())],
      layers: () => [`layers-${name}`, ["layer", "gate and up", "down", "kept", "predicted loss, nats a token", "reason"], layerRows(stage, table, place)],
      retained: () => [`retained-${made}`, ["ratio, %", ...table.layers.map(layer => `layer ${layer}`)], retainedRows(table)],
    };
    window.explorer.save(...tables[asked]());
  }

  function expertRows(table, kept) {
    const rows = [];
    eachCell(table, (row, expert, cell) => rows.push([table.layers[row], expert, (kept[cell] / WHOLE).toFixed(2), table.load[cell]]));
    return rows;
  }

  const layerRows = (stage, table, place) =>
    table.layers.map((layer, index) => {
      const [input, output, , , reason] = stage.words(table, place, index).map(text => text.replace("\n", " "));
      return [layer, input, output, keptOf(table, place, index), table.loss[at(table, place, index)], reason];
    });

  const retainedRows = table => table.asked.map((percent, row) => [percent, ...table.layers.map((_, index) => keptOf(table, row, index))]);

  const KINDS = { control, map, retained };

  window.explorer.ratio = given => {
    const name = given.element.querySelector("[data-stage]").dataset.stage, stage = stageOf(given.element);
    stage.attach(name, given.element);
    KINDS[name](stage, given);
  };
})();
