// Starts the page: asks for the numbers again and again, and for a key where one is needed.

import { Refusal, callJson, useKey } from "./api.js";
import { startChat } from "./chat.js";
import { byId, say } from "./dom.js";
import { showEngine } from "./engine.js";
import { jobsPanel } from "./jobs.js";

const EVERY_MS = 2000;
const jobs = jobsPanel();

function problem(text) {
  say("problem", text);
  byId("problem").hidden = text === "";
}

function locked(isLocked) {
  byId("key-form").hidden = !isLocked;
  document.querySelector("main").hidden = isLocked;
}

function explain(failure) {
  if (!(failure instanceof Refusal)) {
    say("state", "not reached");
    problem("The server does not answer; trying again.");
  } else if (failure.status === 401) {
    const mistyped = byId("key").value !== "";
    locked(true);
    say("state", "locked");
    problem(mistyped ? failure.message : "");
  } else {
    problem(failure.message);
  }
}

async function refresh() {
  try {
    const status = await callJson("/status");
    locked(false);
    problem("");
    showEngine(status);
    await jobs.show(status.jobs);
  } catch (failure) {
    explain(failure);
  }
}

async function forever() {
  if (!document.hidden && byId("key-form").hidden) await refresh();
  setTimeout(forever, EVERY_MS);
}

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey(byId("key").value);
  await refresh();
  if (byId("key-form").hidden) byId("key").value = "";
});

startChat();
forever();
