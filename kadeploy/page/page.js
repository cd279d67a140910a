// The page of kadeploy: one deployment, live.
//
// All it knows comes from the REST API; it asks with the cookie that the login set.  Events bring
// `deployment` (everything) and `change` (the head of it, and nodes that changed).  Text from
// outside is only ever set as textContent.
"use strict";

const $ = (id) => document.getElementById(id);
const API = "/api/v1";
const STATES = ["waiting", "running", "held", "deployed", "failed"];
const MARKS = { held: "‖", deployed: "✓", failed: "✕" };
const LIST_MS = 10000;
const MANY = 120; // nodes that are shown smaller

let source = null;     // the stream of events
let shown = null;      // the deployment, without its nodes
let nodes = new Map(); // name -> node
let tiles = new Map(); // name -> its elements
let filter = "";       // a state, or "" for all
let opened = "";       // the node whose log is open
let logTurn = 0;       // answers to an older question are not shown

// ---------------------------------------------------------------- small things

function make(kind, className, text) {
  const made = document.createElement(kind);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

async function call(path, content) {
  const options = content === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(content),
  };
  const answer = await fetch(API + path, options);
  if (answer.status === 401) location.assign("/login");
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.message);
  return said;
}

function lasted(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  const parts = [[Math.floor(s / 3600), "h"], [Math.floor(s / 60) % 60, "min"], [s % 60, "s"]];
  const used = parts.filter(([n], i) => n > 0 || i === 2).slice(0, 2);
  return used.map(([n, unit]) => `${n} ${unit}`).join(" ");
}

function clock(ms) {
  const parts = { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" };
  const date = new Date(ms);
  const today = date.toDateString() === new Date().toDateString();
  return (today ? "" : `${date.toLocaleDateString()} `) + date.toLocaleTimeString([], parts);
}

// Which of the three macro-steps, from 1.
function macroOf(node) {
  return 1 + Math.max(0, shown.outline.findIndex((one) => one.macro === node.macro));
}

function toneOf(node) {
  return node.status in MARKS ? node.status : `m${macroOf(node)}`;
}

function markOf(node) {
  return MARKS[node.status] || String(macroOf(node));
}

function wordOf(node) {
  if (node.status === "deployed") return "deployed";
  if (node.status === "held") return `held: ${node.step}`;
  return node.step || node.status;
}

// ---------------------------------------------------------------- the list of deployments

async function listDeployments() {
  const list = await call("/deployments");
  const select = $("deployments");
  const want = Number(location.hash.slice(1)) || (list.length ? list[0].id : 0);
  const key = JSON.stringify(list.map((one) => [one.id, one.ended_ms, one.running]));
  if (select.dataset.key !== key) { // an open list is not disturbed without need
    select.dataset.key = key;
    select.replaceChildren(...list.map((one) => {
      const state = one.ended_ms !== null ? "" : one.running ? " · running" : " · stopped";
      const option = make("option", "", `${one.id} · ${one.environment} ${one.version}${state}`);
      option.value = one.id;
      return option;
    }));
  }
  select.value = want;
  $("nothing").hidden = list.length > 0;
  $("choice").hidden = $("connection").hidden = list.length === 0;
  if (want && (!shown || shown.id !== want)) follow(want);
}

function follow(number) {
  if (source) source.close();
  closeLog();
  setText($("notice"), "");
  shown = { id: number };
  filter = "";
  source = new EventSource(`${API}/deployments/${number}/events`);
  source.addEventListener("deployment", (event) => begin(JSON.parse(event.data)));
  source.addEventListener("change", (event) => change(JSON.parse(event.data)));
  source.onopen = () => connection("live", "live");
  source.onerror = () => {
    const refused = source.readyState === EventSource.CLOSED;
    connection("lost", refused ? "there is no such deployment" : "connection lost, trying again");
    call("/me").catch(() => {}); // leads to the login when the token is void
  };
}

// What cannot be done now: the server is away, which the connection shows, or it says why not.
function tell(error) {
  if (!(error instanceof TypeError)) setText($("notice"), error.message);
}

function act(path, content) {
  setText($("notice"), "");
  call(path, content).catch(tell);
}

function refresh() {
  listDeployments().catch(tell);
}

function connection(className, text) {
  $("connection").className = className;
  setText($("connection"), text);
}

function begin(deployment) {
  shown = deployment;
  nodes = new Map(deployment.nodes.map((node) => [node.name, node]));
  tiles = new Map();
  $("grid").replaceChildren(...deployment.nodes.map(makeTile));
  $("grid").className = nodes.size > MANY ? "many" : "";
  $("deployment").hidden = false;
  draw();
}

function change(news) {
  if (news.running !== shown.running) refresh();
  shown = { ...shown, ...news, outline: shown.outline };
  for (const node of news.nodes) {
    nodes.set(node.name, node);
    drawTile(node);
    if (node.name === opened) openLog(node.name, false).catch(tell);
  }
  draw();
}

// ---------------------------------------------------------------- what is above the grid

function draw() {
  setText($("title"), `${shown.environment} version ${shown.version}`);
  const by = shown.user ? ` by ${shown.user}` : "";
  document.title = `${shown.counts.deployed}/${nodes.size} · ${shown.environment} · kadeploy`;
  $("times").dataset.by = `deployment ${shown.id}${by}, began ${clock(shown.started_ms)}`;
  drawTimes();
  drawProgress();
  $("cancel").hidden = !shown.mine || shown.ended_ms !== null;
  $("resume").hidden = !shown.mine || shown.ended_ms !== null || shown.running;
  drawFilters();
  drawSteps();
  drawFailures();
}

function drawTimes() {
  if (!shown || !shown.started_ms) return;
  const end = shown.ended_ms === null ? Date.now() : shown.ended_ms;
  let state = shown.running ? "running for" : "nobody carries it out; began before";
  if (shown.ended_ms !== null) state = "took";
  setText($("times"), `${$("times").dataset.by}, ${state} ${lasted(end - shown.started_ms)}`);
}

// One bar for all nodes: what is deployed, the work done on those under way, what failed.
function drawProgress() {
  let underWay = 0;
  for (const node of nodes.values()) {
    if (!["deployed", "failed"].includes(node.status)) underWay += node.progress;
  }
  const { deployed, failed } = shown.counts;
  const [one, two, three] = $("progress").children;
  const percent = (count) => (nodes.size ? Math.floor((100 * count) / nodes.size) : 0);
  one.style.width = `${percent(deployed)}%`;
  two.style.width = `${percent(underWay)}%`;
  three.style.width = `${percent(failed)}%`;
  const broken = failed ? `, ${failed} failed` : "";
  const text = `${deployed} of ${nodes.size} deployed${broken}`;
  $("progress").setAttribute("aria-valuenow", percent(deployed + underWay + failed));
  $("progress").setAttribute("aria-valuetext", text);
  setText($("tally"), text);
}

function drawFilters() {
  const group = $("filters");
  if (!group.children.length) {
    for (const state of ["", ...STATES]) {
      const button = make("button");
      button.append(make("span", "", state || "all"), make("b"));
      button.dataset.state = state;
      button.addEventListener("click", () => {
        filter = state;
        for (const node of nodes.values()) showTile(node);
        drawFilters();
      });
      group.append(button);
    }
  }
  for (const button of group.children) {
    const state = button.dataset.state;
    const count = state ? shown.counts[state] : nodes.size;
    setText(button.lastChild, String(count));
    button.setAttribute("aria-pressed", String(state === filter));
    button.hidden = Boolean(state) && count === 0 && state !== filter;
  }
}

// Nodes by step: of each macro-step its steps, those of all its ways, in order.
function drawSteps() {
  const counts = new Map();
  const inMacro = new Map();
  for (const node of nodes.values()) {
    if (node.status === "deployed" || node.status === "failed") continue;
    const key = `${node.macro}/${node.step}`;
    counts.set(key, (counts.get(key) || 0) + 1);
    inMacro.set(node.macro, (inMacro.get(node.macro) || 0) + 1);
  }
  const section = $("steps");
  section.hidden = shown.ended_ms !== null;
  if (section.dataset.of !== String(shown.id)) {
    section.dataset.of = shown.id;
    section.replaceChildren(...shown.outline.map(makeMacro));
  }
  for (const count of section.querySelectorAll("[data-macro]")) {
    setText(count, String(inMacro.get(count.dataset.macro) || 0));
  }
  for (const row of section.querySelectorAll(".step")) {
    const count = counts.get(row.dataset.key) || 0;
    row.classList.toggle("none", count === 0);
    row.children[1].max = nodes.size;
    row.children[1].value = count;
    setText(row.children[2], String(count));
  }
}

function makeMacro(macro, index) {
  const box = make("div", `macro m${index + 1}`);
  const title = make("h3");
  const count = make("span", "count");
  count.dataset.macro = macro.macro;
  title.append(make("span", "mark", String(index + 1)), make("span", "", macro.macro), count);
  box.append(title);
  for (const step of new Set(macro.ways.flatMap((way) => way.steps))) {
    const row = make("div", "step");
    row.dataset.key = `${macro.macro}/${step}`;
    const bar = make("progress");
    bar.setAttribute("aria-label", `nodes in ${step}`);
    row.append(make("span", "", step), bar, make("span", "count"));
    box.append(row);
  }
  return box;
}

function drawFailures() {
  const byReason = new Map();
  for (const node of nodes.values()) {
    if (node.status !== "failed") continue;
    byReason.set(node.reason, [...(byReason.get(node.reason) || []), node.name]);
  }
  const key = JSON.stringify([shown.id, ...byReason]);
  const section = $("failures");
  section.hidden = byReason.size === 0;
  if (section.dataset.key === key) return;
  section.dataset.key = key;
  const open = [...section.querySelectorAll("details[open]")];
  const wasOpen = new Set(open.map((one) => one.dataset.reason));
  section.replaceChildren(...[...byReason].map(([reason, names]) => {
    const fold = make("details");
    fold.dataset.reason = reason;
    fold.open = wasOpen.has(reason);
    const few = names.length > 3 ? `${names.length} nodes` : names.join(", ");
    const line = make("summary");
    line.append(make("b", "", `${few} failed: `), make("span", "", reason));
    const list = make("div", "nodes");
    for (const name of names) {
      const button = make("button", "mono", name);
      button.addEventListener("click", () => openLog(name, true).catch(tell));
      list.append(button);
    }
    fold.append(line, list);
    return fold;
  }));
}

// ---------------------------------------------------------------- the grid

function makeTile(node) {
  const tile = make("button");
  const parts = {
    tile,
    mark: make("span", "mark"),
    name: make("span", "name", node.name),
    what: make("span", "what"),
    bar: make("progress"),
  };
  parts.bar.setAttribute("aria-hidden", "true");
  parts.mark.setAttribute("aria-hidden", "true");
  tile.append(parts.mark, parts.name, parts.what, parts.bar);
  tile.dataset.name = node.name;
  tile.tabIndex = tiles.size ? -1 : 0; // one stop for the tab key; arrows go on from there
  tile.addEventListener("click", () => openLog(node.name, true).catch(tell));
  tiles.set(node.name, parts);
  drawTile(node);
  return tile;
}

function drawTile(node) {
  const { tile, mark, what, bar } = tiles.get(node.name);
  tile.className = `tile ${toneOf(node)} ${node.status}`;
  setText(mark, markOf(node));
  setText(what, wordOf(node));
  bar.value = node.progress;
  const reason = node.reason ? `: ${node.reason}` : "";
  const place = node.step ? `, ${node.macro}, ${node.step}` : "";
  tile.title = `${node.name}, ${node.status}${place}${reason}`;
  tile.setAttribute("aria-label", tile.title);
  showTile(node);
}

function showTile(node) {
  tiles.get(node.name).tile.hidden = Boolean(filter) && node.status !== filter;
}

function moveFocus(event) {
  const seen = [...$("grid").children].filter((tile) => !tile.hidden);
  const at = seen.indexOf(document.activeElement);
  if (at < 0) return;
  const top = seen[0].offsetTop;
  const below = seen.findIndex((tile) => tile.offsetTop > top);
  const columns = below < 0 ? seen.length : below;
  const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - columns,
                  ArrowDown: at + columns, Home: 0, End: seen.length - 1 };
  const next = seen[moves[event.key]];
  if (!next) return;
  event.preventDefault();
  seen[at].tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

// ---------------------------------------------------------------- the log of a node

async function openLog(name, byHand) {
  const turn = ++logTurn;
  if (opened && tiles.has(opened)) tiles.get(opened).tile.removeAttribute("aria-current");
  opened = name;
  tiles.get(name).tile.setAttribute("aria-current", "true");
  const node = await call(`/deployments/${shown.id}/nodes/${encodeURIComponent(name)}`);
  if (turn !== logTurn) return;
  const title = make("div", "title");
  const close = make("button", "", "Close");
  close.addEventListener("click", closeLog);
  const word = make("span", "quiet", wordOf(node));
  title.append(make("h3", "mono", name), word, make("span", "space"), close);
  const log = $("log");
  const list = make("ol");
  list.append(...node.tries.map(makeTry));
  const empty = node.tries.length ? [] : [make("p", "quiet", "No step of it has ended yet.")];
  log.replaceChildren(title, ...empty, list);
  if (node.status === "failed") title.after(make("p", "error", node.reason));
  log.hidden = false;
  if (byHand) log.focus({ preventScroll: true });
}

function makeTry(one) {
  const item = make("li", one.ok ? "deployed" : "failed");
  const again = one.attempt > 0 ? `, try ${one.attempt + 1}` : "";
  const word = one.ok ? "✓" : "✕ failed:";
  item.append(
    make("time", "", clock(one.ended_ms)),
    make("span", "", `${word} ${one.step} (${one.implementation}${again})`),
    make("span", "took", `${(one.took_ms / 1000).toFixed(1)} s`),
  );
  if (one.reason) item.append(make("span", "reason", one.reason));
  return item;
}

function closeLog() {
  logTurn += 1;
  const parts = tiles.get(opened);
  opened = "";
  $("log").hidden = true;
  if (!parts) return;
  parts.tile.removeAttribute("aria-current");
  if (!parts.tile.hidden) parts.tile.focus({ preventScroll: true });
}

// ---------------------------------------------------------------- what can be done

function askCancel() {
  const left = nodes.size - shown.counts.deployed - shown.counts.failed;
  const text = `${left} nodes are given up where they are; their disks may be half written.`;
  setText($("cancel-text"), text);
  $("ask-cancel").returnValue = "no";
  $("ask-cancel").showModal();
}

async function askNew() {
  const known = await call("/environments");
  const newest = new Map(known.map((one) => [one.name, one]));
  $("new-environment").replaceChildren(...[...newest.values()].map((one) => {
    const option = make("option", "", `${one.name} (version ${one.version})`);
    option.value = one.name;
    return option;
  }));
  setText($("new-error"), "");
  $("ask-new").showModal();
}

async function deploy() {
  const content = {
    environment: $("new-environment").value,
    nodes: $("new-nodes").value,
    missing: $("new-missing").checked,
  };
  try {
    const begun = await call("/deployments", content);
    if (begun.id === null) throw new Error("All these nodes have it.");
    $("ask-new").close();
    location.hash = String(begun.id);
  } catch (error) {
    setText($("new-error"), error.message);
  }
}

async function main() {
  const me = await call("/me");
  setText($("user"), me.user);
  $("new").hidden = !me.rights.includes("deploy");
  $("deployments").addEventListener("change", (event) => { location.hash = event.target.value; });
  window.addEventListener("hashchange", refresh);
  $("grid").addEventListener("keydown", moveFocus);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && opened && !document.querySelector("dialog[open]")) closeLog();
  });
  $("cancel").addEventListener("click", askCancel);
  $("ask-cancel").addEventListener("close", () => {
    if ($("ask-cancel").returnValue === "yes") act(`/deployments/${shown.id}/cancel`, {});
  });
  $("resume").addEventListener("click", () => act(`/deployments/${shown.id}/resume`, {}));
  $("new").addEventListener("click", () => askNew().catch(tell));
  $("new-go").addEventListener("click", deploy);
  setInterval(drawTimes, 1000);
  setInterval(refresh, LIST_MS);
  await listDeployments();
}

main().catch(tell);
