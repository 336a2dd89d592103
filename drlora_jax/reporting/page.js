"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tooltip = document.body.appendChild(document.createElement("div"));
  tooltip.className = "tooltip";
  tooltip.hidden = true;

  function tell(event, text) {
    tooltip.textContent = text;
    tooltip.hidden = false;
    const { width, height } = tooltip.getBoundingClientRect();
    const left = event.clientX + 14 + width > innerWidth ? event.clientX - 14 - width : event.clientX + 14;
    tooltip.style.left = Math.max(left, 4) + "px";
    tooltip.style.top = Math.max(event.clientY - height - 10, 4) + "px";
  }

  function figure(value) {
    const size = Math.abs(value);
    if (size !== 0 && size < 1e-3) return value.toExponential(2);
    return value.toLocaleString("en-US", size >= 1000 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 5 });
  }

  // ---- maps of layers x experts

  const MARGIN = { left: 36, bottom: 34, top: 2 };
  const canvases = [...document.querySelectorAll("canvas[data-map]")];
  let now = data.steps[data.steps.length - 1];

  function frameAt(map) {
    let found = null;
    for (const frame of map.frames) if (frame[0] <= now) found = frame;
    return found;
  }

  function shapeOf(canvas, map) {
    const columns = Math.max(...map.frames[map.frames.length - 1][1].map((row) => row.length), 1);
    const room = canvas.parentElement.clientWidth - MARGIN.left - 2;
    const width = Math.min(room / columns, 64);
    const height = Math.min(Math.max(width * 0.6, 8), 30);
    return { columns, width, height, rows: map.layers.length };
  }

  // Every how many cells there is room for a label.
  function stride(cell, label) {
    const needed = Math.ceil(label / cell);
    return [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64].find((each) => each >= needed) || 100;
  }

  function drawMap(canvas) {
    const map = data.maps[canvas.dataset.map];
    const shape = shapeOf(canvas, map);
    const pixels = window.devicePixelRatio || 1;
    const full = { width: canvas.parentElement.clientWidth, height: MARGIN.top + shape.rows * shape.height + MARGIN.bottom };
    canvas.width = full.width * pixels;
    canvas.height = full.height * pixels;
    canvas.style.height = full.height + "px";
    const draw = canvas.getContext("2d");
    const styles = getComputedStyle(document.documentElement);
    draw.scale(pixels, pixels);
    draw.clearRect(0, 0, full.width, full.height);
    drawCells(draw, map, shape);
    draw.fillStyle = styles.getPropertyValue("--quiet");
    drawLabels(draw, map, shape);
  }

  function drawCells(draw, map, shape) {
    const frame = frameAt(map);
    const gap = shape.width > 14 ? 1.5 : shape.width > 5 ? 0.5 : 0;
    const hasNumbers = shape.width >= 30 && shape.height >= 15;
    draw.textAlign = "center";
    draw.textBaseline = "middle";
    draw.font = "11.5px system-ui, 'Liberation Sans', sans-serif";
    for (const [row, values] of frame ? frame[1].entries() : []) {
      for (const [column, value] of values.entries()) {
        const part = Math.min(Math.max(value / map.high, 0), 1);
        const left = MARGIN.left + column * shape.width, top = MARGIN.top + row * shape.height;
        draw.fillStyle = data.palette[Math.round(part * (data.palette.length - 1))];
        draw.fillRect(left, top, shape.width - gap, shape.height - gap);
        if (!hasNumbers) continue;
        draw.fillStyle = part > 0.55 ? "#000" : "#fff";
        draw.fillText((value * map.scale).toFixed(map.decimals), left + (shape.width - gap) / 2, top + (shape.height - gap) / 2 + 0.5);
      }
    }
  }

  function drawLabels(draw, map, shape) {
    const bottom = MARGIN.top + shape.rows * shape.height;
    const every = { row: stride(shape.height, 13), column: stride(shape.width, 24) };
    draw.font = "11px system-ui, 'Liberation Sans', sans-serif";
    draw.textAlign = "right";
    for (let row = 0; row < shape.rows; row += every.row)
      draw.fillText(String(map.layers[row]), MARGIN.left - 7, MARGIN.top + (row + 0.5) * shape.height);
    draw.textAlign = "center";
    for (let column = 0; column < shape.columns; column += every.column)
      draw.fillText(String(column), MARGIN.left + (column + 0.5) * shape.width, bottom + 9);
    draw.fillText("expert", MARGIN.left + (shape.columns * shape.width) / 2, bottom + 26);
    draw.save();
    draw.translate(6, MARGIN.top + (shape.rows * shape.height) / 2);
    draw.rotate(-Math.PI / 2);
    draw.fillText("layer", 0, 0);
    draw.restore();
  }

  function tellCell(event) {
    const canvas = event.target, map = data.maps[canvas.dataset.map];
    const shape = shapeOf(canvas, map), box = canvas.getBoundingClientRect(), frame = frameAt(map);
    const column = Math.floor((event.clientX - box.left - MARGIN.left) / shape.width);
    const row = Math.floor((event.clientY - box.top - MARGIN.top) / shape.height);
    const value = frame && frame[1][row] ? frame[1][row][column] : undefined;
    if (value === undefined) tooltip.hidden = true;
    else tell(event, `layer ${map.layers[row]}, expert ${column}\n${figure(value * map.scale)} ${map.unit}\nof step ${frame[0]}`);
  }

  const slider = document.getElementById("step"), play = document.getElementById("play");
  const drawMaps = () => canvases.forEach(drawMap);

  function show(index) {
    now = data.steps[index];
    slider.value = index;
    document.getElementById("at").textContent = `after step ${now}`;
    drawMaps();
  }

  let timer = null;
  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶";
  }
  if (slider) {
    slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
    play.addEventListener("click", () => {
      if (timer) return stop();
      const last = data.steps.length - 1;
      if (Number(slider.value) === last) show(0);
      play.textContent = "❚❚";
      timer = setInterval(() => {
        const next = Number(slider.value) + 1;
        show(Math.min(next, last));
        if (next >= last) stop();
      }, Math.max(6000 / last, 80));
    });
  }
  canvases.forEach((canvas) => {
    canvas.addEventListener("pointermove", tellCell);
    canvas.addEventListener("pointerleave", () => { tooltip.hidden = true; });
  });
  addEventListener("resize", drawMaps);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMaps);
  drawMaps();

  // ---- what the pointer shows on a curve

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const { plot: [left, right, width], range: [low, high], series, unit } = JSON.parse(svg.dataset.chart);
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const [, , , height] = svg.getAttribute("viewBox").split(" ").map(Number);
    for (const [name, value] of [["class", "cursor"], ["y1", 10], ["y2", height - 34]]) cursor.setAttribute(name, value);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const at = low + (((event.clientX - box.left) / box.width) * width - left) / (right - left) * (high - low);
      const nearest = series.map(([name, points]) => [name, points.reduce((best, point) => Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best)]);
      const step = nearest[0][1][0], place = left + (step - low) / (high - low) * (right - left);
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      svg.append(cursor);
      const lines = nearest.map(([name, [, value]]) => `${series.length > 1 ? name + ": " : ""}${figure(value)} ${unit}`);
      tell(event, [`step ${step.toLocaleString("en-US")}`, ...lines].join("\n"));
    });
    svg.addEventListener("pointerleave", () => { tooltip.hidden = true; cursor.remove(); });
  }
})();
