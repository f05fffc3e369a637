"use strict";

// A choice is kept on the device until the server has said that it is on disk, and is sent again until then: its id
// makes sending it twice harmless.
const UNSENT = "dina-lrm-label-unsent-";
const NAME = "dina-lrm-label-rater";
const TIMEOUT = 10_000;
const NAMES = { left: "First picture", right: "Second picture", tie: "Tie", skip: "Skip" }; // side by side, or one above the other

const $ = (id) => document.getElementById(id);
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
const pictureAddress = (number) => `pictures/${number}`; // all addresses are relative: a proxy may add a prefix

let task = null; // what the server last told to show
let busy = true; // a request is on its way, or there is nothing to choose yet
let broken = false; // a picture did not come: only skipping is left
let shownAt = 0;
let showing = 0; // counts pairs, so that a slow picture of an old pair is not taken for the new one
let rater = remember(NAME);

// --- the device's memory, which a browser may deny ----------------------------------------------------------------

function remember(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
  } catch { /* the choice then lives in this page alone */ }
  return null;
}

function unsentVotes() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(UNSENT))
      .map((key) => JSON.parse(localStorage.getItem(key)));
  } catch {
    return [];
  }
}

// --- the server ---------------------------------------------------------------------------------------------------

async function insist(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  };
  for (let wait = 500; ; wait = Math.min(2 * wait, 4000)) {
    let trouble = "The server does not answer.";
    try {
      const reply = await fetch(path, { ...options, signal: AbortSignal.timeout(TIMEOUT) });
      if (reply.status === 401) {
        location.assign("./"); // asks for the token; what is unsent stays on the device
        await new Promise(() => {});
      }
      if (reply.status < 500) {
        const answer = { good: reply.ok, ...(await reply.json()) };
        tell("offline", "");
        return answer;
      }
      trouble = `The server has trouble: ${(await reply.json()).error}.`;
    } catch { /* no answer, or half of one */ }
    const kept = body?.choice ? `Your choice (${NAMES[body.choice].toLowerCase()}) is kept on this device and is sent ` : "It is asked again ";
    tell("offline", `${trouble} ${kept}as soon as it is back.`);
    await pause(wait);
  }
}

function tell(id, text) {
  $(id).textContent = text;
  $(id).hidden = !text;
}

// --- what is shown ------------------------------------------------------------------------------------------------

function view(name) {
  const changed = $(name).hidden;
  for (const id of ["enter", "work", "finished"]) $(id).hidden = id !== name;
  $("foot").hidden = name === "enter";
  $("leave").hidden = name === "enter";
  $("who").textContent = name === "enter" ? "" : `Rater: ${task.rater}`;
  $("skip").hidden = name === "finished";
  if (name === "enter") $("name").focus();
  else if (changed) $(name).querySelector("h1").focus(); // what had the focus may be gone
}

function enable() { // aria-disabled, and not disabled: a button that is pressed keeps the focus
  const disable = (id, off) => $(id).setAttribute("aria-disabled", String(Boolean(off)));
  for (const id of ["left", "tie", "right"]) disable(id, busy || broken);
  disable("skip", busy || !task?.pair);
  disable("undo", busy || !task?.last_vote);
}

async function show(next) {
  task = next;
  busy = true;
  broken = false;
  const mark = ++showing;
  $("mine-text").textContent = `You: ${task.done} of ${task.done + task.left} pairs`;
  $("mine").max = Math.max(1, task.done + task.left);
  $("mine").value = task.done;
  $("all-text").textContent = `All raters: ${task.votes} of ${task.wanted} votes`;
  $("all").max = Math.max(1, task.wanted);
  $("all").value = task.votes;
  if (!task.pair) {
    view("finished");
    busy = false;
    return enable();
  }
  $("prompt").textContent = task.pair.prompt;
  view("work");
  enable();
  if ($("large").open) $("large").close();
  $("work").classList.add("waiting");
  for (let attempt = 0; ; attempt++) {
    const repeated = attempt ? `?attempt=${attempt}` : "";
    const pictures = ["left", "right"].map((side) => {
      const picture = $(`${side}-picture`);
      picture.src = pictureAddress(task.pair[side]) + repeated;
      return picture.decode();
    });
    const outcome = await Promise.allSettled(pictures);
    if (mark !== showing) return;
    broken = outcome.some((one) => one.status === "rejected");
    if (!broken || attempt === 2) break;
    await insist(`api/next?rater=${encodeURIComponent(rater)}`); // waits until the server is back
    if (mark !== showing) return;
  }
  $("work").classList.remove("waiting");
  if (broken) tell("notice", "A picture of this pair cannot be shown. Skip it, or reload the page.");
  shownAt = performance.now();
  busy = false;
  enable();
  for (const number of task.preload) new Image().src = pictureAddress(number);
}

async function load() {
  const answer = await insist(`api/next?rater=${encodeURIComponent(rater)}`);
  if (answer.good) return show(answer);
  remember(NAME, null);
  rater = null;
  view("enter");
  tell("notice", answer.error);
}

// --- what raters do -----------------------------------------------------------------------------------------------

async function choose(choice) {
  if (busy || !task?.pair || (broken && choice !== "skip")) return;
  busy = true;
  enable();
  tell("notice", "");
  const vote = {
    items: task.items,
    id: Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join(""),
    rater,
    pair: task.pair.index,
    left: task.pair.left,
    choice,
    seconds: Math.round(performance.now() - shownAt) / 1000,
  };
  remember(UNSENT + vote.id, JSON.stringify(vote));
  const answer = await send(vote);
  const next = answer.pair ? ` Next: ${answer.pair.prompt}` : "";
  $("spoken").textContent = answer.good ? `${NAMES[choice]} recorded.${next}` : "not recorded";
  return answer.good ? show(answer) : load();
}

async function send(vote) {
  const answer = await insist("api/votes", vote);
  remember(UNSENT + vote.id, null);
  if (!answer.good) tell("notice", `A choice was not recorded: ${answer.error}`);
  return answer;
}

async function undo() {
  if (busy || !task?.last_vote) return;
  busy = true;
  enable();
  tell("notice", "");
  const answer = await insist("api/undo", { items: task.items, rater, vote: task.last_vote });
  if (!answer.good) {
    tell("notice", answer.error);
    return load();
  }
  $("spoken").textContent = "Your last choice was taken back";
  return show(answer);
}

function enlarge(side) {
  if (!task?.pair || broken) return;
  $("large-picture").src = $(`${side}-picture`).src;
  $("large-picture").alt = NAMES[side];
  $("large").dataset.side = side;
  $("other-text").textContent = NAMES[opposite(side)];
  if (!$("large").open) $("large").showModal();
}
const opposite = (side) => (side === "left" ? "right" : "left");
const turn = () => enlarge(opposite($("large").dataset.side));

async function start() {
  for (const vote of unsentVotes()) await send(vote);
  if (rater) return load();
  view("enter");
}

const KEYS = {
  ArrowLeft: () => choose("left"),
  ArrowRight: () => choose("right"),
  ArrowDown: () => choose("tie"),
  t: () => choose("tie"),
  s: () => choose("skip"),
  z: undo,
  Backspace: undo,
  1: () => enlarge("left"),
  2: () => enlarge("right"),
};
const LARGE_KEYS = { // no choice is made while a picture is enlarged; Escape closes it by itself
  ArrowLeft: turn,
  ArrowRight: turn,
  1: () => enlarge("left"),
  2: () => enlarge("right"),
};

addEventListener("keydown", (event) => {
  const act = ($("large").open ? LARGE_KEYS : KEYS)[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act || event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "INPUT") return;
  if (!$("enter").hidden) return;
  event.preventDefault();
  if (!event.repeat) act(); // a key that is held down is one choice
});
for (const side of ["left", "right"]) $(`${side}-enlarge`).addEventListener("click", () => enlarge(side));
$("other").addEventListener("click", turn);
for (const id of ["close", "large-picture"]) $(id).addEventListener("click", () => $("large").close());
for (const id of ["left", "tie", "right", "skip"]) $(id).addEventListener("click", () => choose(id));
$("undo").addEventListener("click", undo);
$("leave").addEventListener("click", () => {
  showing++;
  busy = true;
  rater = null;
  remember(NAME, null);
  tell("notice", "");
  view("enter");
  $("name").value = "";
});
$("enter-form").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = $("name").value.trim();
  if (!rater) return;
  remember(NAME, rater);
  tell("notice", "");
  load();
});
start();
