// What every page must keep, for people who do not see it, or see little: returns what is wrong.
() => {
  const faults = [];
  const name = (e) => (e.getAttribute("aria-label") || (e.labels && [...e.labels].map((l) => l.textContent).join(" "))
    || (e.getAttribute("aria-labelledby") || "").split(" ").map((id) => document.getElementById(id)?.textContent || "").join(" ").trim()
    || e.textContent).trim();
  const seen = (e) => e.checkVisibility();
  const where = (e) => e.outerHTML.slice(0, 120);
  if (document.documentElement.lang !== "en") faults.push("no language");
  if (!/\S – holdtrue$/.test(document.title)) faults.push("no title");
  for (const [what, count] of [["main", 1], ["h1", 1], ["body > header", 1], ["body > footer", 1]])
    if (document.querySelectorAll(what).length !== count) faults.push(`not ${count} ${what}`);
  let level = 0;
  for (const each of [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].filter(seen)) {
    const own = Number(each.tagName[1]);
    if (own > level + 1) faults.push(`heading jumps: ${where(each)}`);
    if (!each.textContent.trim()) faults.push("empty heading");
    level = own;
  }
  for (const each of document.querySelectorAll("input:not([type=hidden]), select, textarea"))
    if (!name(each)) faults.push(`no label: ${where(each)}`);
  for (const each of document.querySelectorAll("button, a[href], summary, figure svg, [role=region], nav, section, [role=img], meter"))
    if (!name(each)) faults.push(`no name: ${where(each)}`);
  for (const each of document.querySelectorAll("nav, [role=region]"))
    if ([...document.querySelectorAll("nav, [role=region]")].some((e) => e !== each && e.tagName === each.tagName && name(e) === name(each)))
      faults.push(`two of one name: ${where(each)}`);
  for (const table of document.querySelectorAll("table")) {
    if (!table.caption?.textContent.trim()) faults.push("table without a caption");
    for (const head of table.querySelectorAll("th")) if (!head.scope) faults.push(`no scope: ${where(head)}`);
    for (const row of table.tBodies[0]?.rows ?? [])
      if (row.cells.length > 1 && row.cells.length !== table.tHead.rows[0].cells.length) faults.push("ragged table");
  }
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  for (const id of ids) if (ids.filter((each) => each === id).length > 1) faults.push(`id twice: ${id}`);
  for (const attribute of ["aria-labelledby", "aria-describedby", "for"])
    for (const each of document.querySelectorAll(`[${attribute}]`))
      for (const id of each.getAttribute(attribute).split(" "))
        if (!document.getElementById(id)) faults.push(`${attribute} of nothing: ${where(each)}`);
  for (const each of document.querySelectorAll("img:not([alt]), [tabindex]"))
    if (each.tagName === "IMG" || each.tabIndex > 0) faults.push(where(each));
  for (const each of document.querySelectorAll("dl > *, ul > *, ol > *")) {
    const parent = each.parentElement.tagName;
    if (parent === "DL" ? !["DIV", "DT", "DD"].includes(each.tagName) : each.tagName !== "LI") faults.push(`list: ${where(each)}`);
  }
  if (document.querySelector("[style], style, script:not([src]), [onclick], [onload], [onerror]")) faults.push("inline");
  const rgb = (text) => text.match(/[\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = color.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (let at = e; at; at = at.parentElement) {
      const color = rgb(getComputedStyle(at).backgroundColor);
      if (color[3] !== 0) return color;
    }
    return [255, 255, 255];
  };
  for (const each of document.querySelectorAll("body *")) {
    if (![...each.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || !seen(each) || each.closest("svg")) continue;
    const [one, two] = [light(rgb(getComputedStyle(each).color)), light(ground(each))].sort((a, b) => b - a);
    if ((one + 0.05) / (two + 0.05) < 4.5) faults.push(`contrast: ${where(each)}`);
  }
  return [...new Set(faults)];
}
