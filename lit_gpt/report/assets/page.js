// Draws the page's plots from the JSON in #data with uPlot; choice of axis, theme, printing, and following a live run.
(() => {
  "use strict";
  const PAPER_WIDTH = 680, MANY_MARKS = 12;
  const WHOLE = Array.from({ length: 12 }, (_, power) => [1, 2, 5].map(n => n * 10 ** power)).flat();
  const root = document.documentElement, controls = document.getElementById("controls");
  let data = [], plots = [], axis = null, printing = false;

  // A colour of the style sheet as the canvas takes it: variables hold light-dark(), which only an element resolves.
  const probe = document.body.appendChild(document.createElement("i"));
  probe.hidden = true;
  const colour = name => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
  const alpha = (rgb, a) => rgb.replace(/^rgb\((.*)\)$/, (_, c) => `rgba(${c}, ${a})`);

  const UNITS = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
  function short(v) {
    if (v == null) return "";
    const size = Math.abs(v), unit = UNITS.find(([u]) => size >= u && size >= 1e4);
    if (unit) return +(v / unit[0]).toPrecision(4) + unit[1];
    return size > 0 && size < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(6));
  }
  const full = v => v == null ? "–" : Number.isInteger(v) ? v.toLocaleString("en") : String(+v.toPrecision(7));

  const axesOf = spec => Object.keys(spec.series[0]?.x ?? {});
  const axisOf = spec => axesOf(spec).includes(axis) ? axis : axesOf(spec)[0];

  // uPlot wants one rising x for all series; join() makes it, and keeps gaps (null) apart from what was not there.
  function columns(spec, name) {
    const tables = spec.series.map(s => {
      const x = [], y = [];
      (s.x[name] ?? []).forEach((at, i) => {
        if (at == null || (x.length && at <= x[x.length - 1]) || (spec.log_x && at <= 0)) return;
        x.push(at);
        y.push(spec.log_y && s.y[i] <= 0 ? null : s.y[i]);
      });
      return [x, y];
    });
    return tables.length ? uPlot.join(tables) : [[], []];
  }

  function nearest(u, series, at) {  // the series' own value that is nearest to the pointer
    const x = u.data[0], y = u.data[series];
    if (y[at] != null || !x.length) return at;
    let left = at, right = at;
    while (left >= 0 && y[left] == null) left--;
    while (right < y.length && y[right] == null) right++;
    if (left < 0 && right >= y.length) return at;
    if (left < 0) return right;
    if (right >= y.length) return left;
    return x[at] - x[left] < x[right] - x[at] ? left : right;
  }

  function markHooks(spec, name, said) {
    const marks = spec.marks.filter(m => m.x[name] != null);
    const kinds = { plain: "dim", good: "good", warning: "warning", bad: "bad" };
    return {
      drawAxes: [u => {
        const { left, top, width, height } = u.bbox, c = u.ctx;
        c.save();
        c.beginPath(); c.rect(left, top, width, height); c.clip();
        for (const m of marks) {
          const x = u.valToPos(m.x[name], "x", true);
          if (x < left || x > left + width) continue;
          c.strokeStyle = c.fillStyle = colour(kinds[m.kind]);
          c.lineWidth = devicePixelRatio; c.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
          const length = m.named || marks.length <= MANY_MARKS ? height : 14 * devicePixelRatio;
          c.beginPath(); c.moveTo(x, top); c.lineTo(x, top + length); c.stroke();
          if (m.named) {
            const near = x > left + width * 0.7;
            c.font = `${12 * devicePixelRatio}px system-ui, sans-serif`; c.textAlign = near ? "right" : "left";
            c.fillText(m.label, x + (near ? -6 : 6) * devicePixelRatio, top + 14 * devicePixelRatio);
          }
        }
        c.restore();
      }],
      setCursor: [u => {
        const at = u.cursor.left;
        const close = at < 0 ? [] : marks.filter(m => Math.abs(u.valToPos(m.x[name], "x") - at) < 7);
        const text = close.slice(0, 4).map(m => `${name} ${full(m.x[name])}: ${m.label}`).join(" · ");
        said.textContent = text + (close.length > 4 ? ` · ${close.length - 4} more` : "");
      }],
    };
  }

  function draw(holder, spec, zoom) {
    const name = axisOf(spec), values = columns(spec, name);
    const said = document.createElement("p");
    said.className = "mark";
    const series = spec.series.map(s => {
      const stroke = colour(`c${s.colour}`), steps = s.style === "steps";
      return {
        label: s.name, stroke: s.style === "faint" ? alpha(stroke, 0.5) : stroke, width: s.style === "faint" ? 1 : 1.5,
        dash: s.style === "dashed" ? [6, 4] : undefined, points: { show: s.style === "points" ? true : undefined, size: 6 },
        paths: steps ? uPlot.paths.stepped({ align: 1 }) : undefined, fill: steps ? alpha(stroke, 0.18) : undefined,
        value: (_, v) => full(v),
      };
    });
    const look = { stroke: () => colour("dim"), grid: { stroke: () => colour("grid"), width: 1 }, ticks: { stroke: () => colour("grid"), width: 1 }, values: (_, v) => v.map(short) };
    const wide = u => (u && u.length ? Math.max(...u.map(v => v.length)) : 3) * 7 + 22;
    const range = spec.log_y ? undefined : (_, low, high) => low == null ? [0, 1] : spec.zero ? uPlot.rangeNum(0, Math.max(high, 1e-12), 0.05, true) : uPlot.rangeNum(low, high, 0.05, true);
    const width = printing ? PAPER_WIDTH : holder.clientWidth;
    const u = new uPlot({
      width, height: 260, series: [{ label: name, value: (_, v) => full(v) }, ...series],
      scales: { x: { time: false, distr: spec.log_x ? 3 : 1 }, y: { distr: spec.log_y ? 3 : 1, range } },
      axes: [{ ...look, label: name, incrs: name === "step" ? WHOLE : undefined, labelSize: 18, size: 32, labelFont: "12px system-ui", font: "12px system-ui" },
             { ...look, size: (_, v) => wide(v), label: spec.y_label || undefined, labelSize: 18, labelFont: "12px system-ui", font: "12px system-ui" }],
      cursor: { sync: { key: name, setSeries: false }, drag: { x: true, y: true, uni: 40 }, dataIdx: nearest, points: { size: 6 } },
      hooks: markHooks(spec, name, said), legend: { live: true },
    }, values, holder);
    holder.append(said);
    if (zoom && zoom.axis === name) u.setScale("x", zoom);
    return u;
  }

  const widths = new ResizeObserver(changes => {
    for (const { target } of printing ? [] : changes) {
      const plot = plots.find(p => p.holder === target), width = target.clientWidth;
      if (plot && width && plot.u.width !== width) plot.u.setSize({ width, height: 260 });
    }
  });

  function zoomOf(u, spec) {
    const x = u.data[0], { min, max } = u.scales.x;
    return x.length && (min > x[0] || max < x[x.length - 1]) ? { axis: axisOf(spec), min, max } : null;
  }

  function drawAll(keep) {
    const zooms = new Map(keep ? plots.map(p => [p.spec.title, p.zoom ? p.zoom() : null]) : []);
    plots.forEach(p => p.u.destroy());
    widths.disconnect();
    plots = [...document.querySelectorAll("[data-plot]")].map(holder => {
      holder.replaceChildren();
      widths.observe(holder);
      const spec = data[+holder.dataset.plot], u = draw(holder, spec, zooms.get(spec.title));
      return { holder, spec, u, zoom: () => zoomOf(u, spec) };
    });
  }

  function arrange() {  // plots that follow each other stand side by side where there is room
    document.querySelectorAll("section").forEach(section => {
      let row = null;
      [...section.children].forEach(child => {
        if (!child.matches("figure.plot")) { row = null; return; }
        if (!row) { row = document.createElement("div"); row.className = "plots"; child.before(row); }
        row.append(child);
      });
    });
  }

  function choices() {
    controls.replaceChildren();
    const names = [...new Set(data.flatMap(spec => axesOf(spec).length > 1 ? axesOf(spec) : []))];
    if (names.length > 1) {
      axis = names.includes(axis) ? axis : names[0];
      const group = document.createElement("span");
      group.setAttribute("role", "group");
      group.setAttribute("aria-label", "horizontal axis");
      names.forEach(name => {
        const button = document.createElement("button");
        button.textContent = name;
        button.setAttribute("aria-pressed", String(name === axis));
        button.onclick = () => { axis = name; choices(); drawAll(false); };
        group.append(button);
      });
      controls.append(group);
    }
    const theme = document.createElement("button");
    const next = { "": "dark", dark: "light", light: "" }, now = root.dataset.theme ?? "";
    theme.textContent = `colours: ${now || "of the system"}`;
    theme.onclick = () => { if (next[now]) root.dataset.theme = next[now]; else delete root.dataset.theme; choices(); drawAll(true); };
    controls.append(theme);
    const live = document.createElement("span");
    live.id = "live";
    if (document.body.dataset.live) controls.append(live);
  }

  function begin(keep) {
    data = JSON.parse(document.getElementById("data").textContent);
    arrange();
    choices();
    drawAll(keep);
  }

  // A served page looks for a newer one and takes its content over, without losing place, zoom or open details.
  let version = null;
  async function follow() {
    const live = () => document.getElementById("live");
    try {
      const answer = await fetch(location.href, { cache: "no-cache" });
      if (!answer.ok) throw new Error(String(answer.status));
      const tag = answer.headers.get("ETag"), text = await answer.text();
      if (version !== null && tag !== version) {
        const fresh = new DOMParser().parseFromString(text, "text/html");
        const open = [...document.querySelectorAll("details[open] > summary")].map(s => s.textContent);
        document.querySelector("main").replaceWith(fresh.querySelector("main"));
        document.querySelector("nav").replaceWith(fresh.querySelector("nav"));
        document.querySelector("header > div").replaceWith(fresh.querySelector("header > div"));
        document.querySelectorAll("details > summary").forEach(s => { s.parentNode.open = open.includes(s.textContent); });
        begin(true);
      }
      version = tag;
      if (live()) live().textContent = "live";
    } catch (error) {
      if (live()) live().textContent = "the server does not answer";
    }
    setTimeout(follow, 1000 * document.body.dataset.live);
  }

  function paper(on) {
    if (on === printing) return;
    printing = on;
    if (on) { paper.theme = root.dataset.theme ?? ""; root.dataset.theme = "light"; }
    else if (paper.theme) root.dataset.theme = paper.theme;
    else delete root.dataset.theme;
    document.querySelectorAll("details").forEach(d => { if (on) { d.dataset.was = d.open; d.open = true; } else d.open = d.dataset.was === "true"; });
    drawAll(true);
  }

  window.report = { plots: () => plots };  // for a browser's console, and the tests
  begin(false);
  addEventListener("beforeprint", () => paper(true));
  addEventListener("afterprint", () => paper(false));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll(true));
  if (document.body.dataset.live && location.protocol.startsWith("http")) follow();
})();
