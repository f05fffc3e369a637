"use strict";

const EVERY = 5000;
const key = location.hash.slice(1); // behind the #, so it goes into no log
const $ = (id) => document.getElementById(id);
const percent = (value) => `${(100 * value).toFixed(1)}\u00a0%`;
const share = (found) => (found ? `${percent(found.value)} (${percent(found.low)} to ${percent(found.high)})` : "no votes yet");

function fill(id, rows) {
  $(id).replaceChildren(...rows.map(([head, ...cells]) => {
    const row = document.createElement("tr");
    const name = row.appendChild(document.createElement("th"));
    name.scope = "row";
    name.textContent = head;
    for (const cell of cells) row.appendChild(document.createElement("td")).textContent = cell;
    return row;
  }));
}

function show(found) {
  $("title").textContent = `Results of ${found.items}`;
  const votes = [
    ["Votes", found.votes],
    ["Pairs with a vote", `${found.pairs_begun} of ${found.pairs}`],
    [`Pairs with ${found.raters_per_pair} or more votes`, `${found.pairs_finished} of ${found.pairs}`],
    ["Ties, of the votes (95 % interval)", share(found.ties)],
    ["Skipped", found.skips],
  ];
  if (found.rejected_rows) votes.push(["Rows of the items that give no pair", found.rejected_rows]);
  for (const one of found.unreadable) votes.push([`Pair ${one.pair} cannot be shown`, one.reason]);
  if (found.reward) votes.push(["The reward, which chooses pairs", found.reward]);
  fill("votes", votes);
  fill("agreement", [
    ["Equal answers", found.agreement === null ? "no pair has two votes yet" : percent(found.agreement)],
    ["Krippendorff’s alpha", found.alpha === null ? "not defined yet" : found.alpha.toFixed(3)],
  ]);
  fill("sides", [["Left, of left and right (95 % interval)", share(found.left)]]);
  fill("raters", found.raters.map((one) => [
    one.rater, one.votes, one.ties, one.skips, one.left ? percent(one.left.value) : "–", `${one.median_seconds.toFixed(1)} s`,
  ]));
}

async function refresh() {
  try {
    const reply = await fetch("api/results", { headers: { "x-results-key": key }, signal: AbortSignal.timeout(2 * EVERY) });
    if (reply.status === 401) return location.assign("./");
    $("closed").hidden = reply.status !== 403;
    $("open").hidden = reply.status === 403;
    if (reply.status === 403) return;
    if (!reply.ok) throw new Error(`${reply.status}`);
    show(await reply.json());
    $("offline").hidden = true;
  } catch {
    $("offline").textContent = "The server does not answer. The figures below may be old; it is asked again every few seconds.";
    $("offline").hidden = false;
  }
  setTimeout(refresh, EVERY);
}
refresh();
