"use strict";
// Draws a job's curves from the page's own table, and keeps the page up to date while the job runs. Without it the page
// says the same once it is loaded again. Text is only ever set as text; nothing here makes HTML from a string.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const NAMES = ["loss", "validation", "kl"];
  const MOST = 1500;
  const MOST_ROWS = 400;
  const MOST_EVENTS = 300;
  const section = document.getElementById("curves");
  const body = document.querySelector("#points tbody");
  let attempt = Number(section.dataset.attempt);
  let points = [...body.rows].map((row) => {
    const values = [...row.cells].slice(1).map((cell) => ("value" in cell.dataset ? Number(cell.dataset.value) : null));
    return { step: Number(row.cells[0].textContent), loss: values[0], validation: values[1], kl: values[2] };
  });

  function make(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function short(value) {
    return String(Number(value.toPrecision(3))).replace("-", "\u2212");
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw);
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(at);
    return found;
  }

  function draw(figure) {
    const series = figure.dataset.series.split(" ").map((name) => points.filter((each) => each[name] !== null).map((each) => [each.step, each[name]]));
    const all = series.flat();
    figure.hidden = all.length === 0;
    if (!all.length) return;
    const [width, height, left, right, top, bottom] = [560, 260, 56, 14, 12, 40];
    let [x0, x1] = [Math.min(...all.map((each) => each[0])), Math.max(...all.map((each) => each[0]))];
    let [y0, y1] = [Math.min(...all.map((each) => each[1])), Math.max(...all.map((each) => each[1]))];
    if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
    const room = (y1 - y0) * 0.08 || Math.abs(y1) * 0.1 || 0.1;
    [y0, y1] = [y0 >= 0 ? Math.max(0, y0 - room) : y0 - room, y1 + room];
    const x = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
    const y = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
    const title = figure.querySelector("strong").textContent;
    const last = figure.dataset.series.split(" ").map((name, index) => (series[index].length ? `${figure.querySelectorAll(".key")[index].textContent} ${short(series[index].at(-1)[1])}` : null)).filter((each) => each);
    const label = `${title} by step. At the end: ${last.join(", ")} ${figure.dataset.unit}. The figures are in the table.`;
    const chart = make("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label });
    for (const value of ticks(y0, y1, 4)) {
      chart.append(make("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
      chart.append(make("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    for (const value of ticks(x0, x1, 6).filter(Number.isInteger)) {
      chart.append(make("text", { x: x(value), y: height - bottom + 18, "text-anchor": "middle" }, String(value)));
    }
    chart.append(make("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, `step (${figure.dataset.unit} upward)`));
    series.forEach((each, index) => {
      const kind = index ? "two" : "one";
      if (each.length > 1) {
        const path = each.map((at, number) => `${number ? "L" : "M"}${x(at[0]).toFixed(1)} ${y(at[1]).toFixed(1)}`).join("");
        chart.append(make("path", { class: `series ${kind}`, d: path }));
      }
      if (each.length && each.length < 40) for (const at of each) chart.append(make("circle", { class: `dot ${kind}`, cx: x(at[0]), cy: y(at[1]), r: 3 }));
    });
    figure.querySelector("svg")?.remove();
    figure.append(chart);
  }

  let due = false;
  function drawSoon() {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      document.querySelectorAll("[data-chart]").forEach(draw);
      document.getElementById("no-points").hidden = points.length > 0;
    });
  }

  function row(point) {
    const made = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.className = "number";
    head.textContent = String(point.step);
    made.append(head);
    for (const name of NAMES) {
      const cell = document.createElement("td");
      cell.className = "number";
      cell.textContent = point[name] === null ? "\u2013" : String(Number(point[name].toPrecision(4))).replace("-", "\u2212");
      made.append(cell);
    }
    return made;
  }

  function add(point) {
    if (point.attempt < attempt) return;
    if (point.attempt > attempt) {
      attempt = point.attempt;
      points = [];
      body.replaceChildren();
    }
    const before = points.findIndex((each) => each.step >= point.step);
    if (before === -1) {
      points.push(point);
      body.append(row(point));
    } else if (points[before].step === point.step) {
      for (const name of NAMES) if (point[name] !== null) points[before][name] = point[name];
      [...body.rows].find((each) => Number(each.cells[0].textContent) === point.step)?.replaceWith(row(points[before]));
    } else {
      points.splice(before, 0, point);
    }
    if (points.length > MOST) points = points.filter((each, index) => index % 2 === 1 || index === points.length - 1);
    while (body.rows.length > MOST_ROWS) body.rows[0].remove();
    drawSoon();
  }

  function tell(event) {
    const list = document.getElementById("events");
    const box = list.parentElement;
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    const item = document.createElement("li");
    item.className = event.level;
    const at = document.createElement("time");
    at.textContent = event.at;
    const level = document.createElement("span");
    level.className = "level";
    level.textContent = event.level;
    const text = document.createElement("span");
    text.className = "text";
    text.dir = "auto";
    text.textContent = event.message;
    item.append(at, " ", level, " ", text);
    list.append(item);
    while (list.children.length > MOST_EVENTS) list.firstElementChild.remove();
    if (atEnd) box.scrollTop = box.scrollHeight;
  }

  // The parts that only the server knows how to write are taken from the page, loaded once more.
  let loading = false;
  let again = false;
  function refresh() {
    if (loading) {
      again = true;
      return;
    }
    loading = true;
    const request = new XMLHttpRequest();
    request.open("GET", location.pathname);
    request.setRequestHeader("Accept", "text/html");
    request.responseType = "document";
    request.onloadend = () => {
      loading = false;
      if (request.response) swap(request.response);
      if (again) {
        again = false;
        refresh();
      }
    };
    request.send();
  }

  function swap(fresh) {
    for (const old of document.querySelectorAll("[data-swap]")) {
      const made = fresh.getElementById(old.id);
      if (!made) {
        location.reload();
        return;
      }
      const focused = old.contains(document.activeElement) ? document.activeElement.id : "";
      const open = [...old.querySelectorAll("details[open][id]")].map((each) => each.id);
      old.replaceWith(document.adoptNode(made));
      for (const id of open) document.getElementById(id)?.setAttribute("open", "");
      if (focused) (document.getElementById(focused) ?? document.getElementById("content")).focus({ preventScroll: true });
    }
    document.title = fresh.title;
  }

  function listen(from) {
    let source = null;
    let ended = false;
    let last = from;
    let state = document.getElementById("state").dataset.state;
    const seen = new Set();
    const take = (handler) => (event) => {
      if (event.lastEventId && seen.has(event.lastEventId)) return;
      if (event.lastEventId) {
        seen.add(event.lastEventId);
        last = Math.max(last, Number(event.lastEventId));
      }
      handler(JSON.parse(event.data));
    };
    const path = section.dataset.live.split("?")[0];
    const close = () => {
      source?.close();
      source = null;
    };
    const open = () => {
      if (source) return;
      source = new EventSource(`${path}?after=${last}`);
      source.addEventListener("metrics", take(add));
      source.addEventListener("quiet", take(() => {}));
      source.addEventListener("message", (event) => take((values) => {
        tell(values);
        if (values.type === "moderation_checks") refresh();
      })(event));
      source.addEventListener("state", (event) => {
        // Not `take`: it has no number of its own, and the browser gives it that of the event before.
        const now = JSON.parse(event.data);
        if (state !== `${now.status}|${now.stage}`) {
          state = `${now.status}|${now.stage}`;
          document.getElementById("announce").textContent = `Now ${now.status.replace("_", " ")}${now.stage && now.status === "running" ? `, stage ${now.stage}` : ""}.`;
        }
        refresh();
      });
      source.addEventListener("end", () => {
        ended = true;
        close();
        refresh();
      });
      source.addEventListener("error", () => {
        // A broken line is mended by the browser; a refusal (too many pages, no session any more) is tried again here.
        if (ended || source?.readyState !== EventSource.CLOSED) return;
        close();
        setTimeout(() => {
          refresh();
          look();
        }, 30000);
      });
    };
    // A browser has few connections to one host: a page that nobody sees keeps none.
    const look = () => (document.hidden || ended ? close() : open());
    document.addEventListener("visibilitychange", look);
    look();
  }

  document.getElementById("figures-table").open = false;
  const log = document.getElementById("events").parentElement;
  log.scrollTop = log.scrollHeight;
  drawSoon();
  if (section.dataset.live) listen(Number(new URL(section.dataset.live, location.href).searchParams.get("after")));
})();
