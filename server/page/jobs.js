// Batch jobs: what there is, how far it is, a form for a new one.

import { call, callJson, post } from "./api.js";
import { byId, element, number, say } from "./dom.js";

const WINDOW = "24h";
const UNFINISHED = new Set(["validating", "in_progress", "finalizing", "cancelling"]);

export function jobsPanel() {
  const lines = new Map(); // batch id -> its line, kept so that a focused button stays so

  async function show(areOn) {
    byId("jobs-on").hidden = !areOn;
    byId("jobs-off").hidden = areOn;
    if (!areOn) return;
    const batches = (await callJson("/v1/batches?limit=20")).data;
    for (const batch of batches) {
      if (!lines.has(batch.id)) lines.set(batch.id, jobLine(batch.id));
      lines.get(batch.id).show(batch);
    }
    const nodes = batches.map((batch) => lines.get(batch.id).node);
    const list = byId("jobs");
    if (nodes.length !== list.children.length || nodes[0] !== list.firstChild) {
      list.replaceChildren(...nodes);
    }
  }

  byId("job-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    await submit(byId("job-file").files[0], byId("job-endpoint").value, () => show(true));
  });
  return { show };
}

async function submit(file, endpoint, done) {
  byId("job-send").disabled = true;
  say("job-news", `Sending ${file.name}`);
  try {
    const form = new FormData();
    form.append("purpose", "batch");
    form.append("file", file);
    const sent = await callJson("/v1/files", { method: "POST", body: form });
    const order = { input_file_id: sent.id, endpoint, completion_window: WINDOW };
    const batch = await (await post("/v1/batches", order)).json();
    say("job-news", `Submitted as ${batch.id}`);
    byId("job-form").reset();
    await done();
  } catch (failure) {
    say("job-news", failure.message);
  } finally {
    byId("job-send").disabled = false;
  }
}

function jobLine(id) {
  const title = element("span");
  const bar = element("progress", { max: 1 });
  bar.setAttribute("aria-label", `progress of ${id}`);
  const text = element("p");
  const cancel = button("Cancel", text, () => call(`/v1/batches/${id}/cancel`, { method: "POST" }));
  const results = button("Results so far", text, () => save(`/v1/batches/${id}/results`, `${id}.jsonl`));
  const node = element("li", {}, title, bar, text, element("div", { className: "buttons" }, results, cancel));

  function show(batch) {
    const { lines: ended, total, tokens_per_second: rate } = batch.progress;
    const failed = batch.request_counts.failed;
    title.textContent = `${id}: ${batch.status}`;
    bar.value = total ? ended / total : 0;
    const parts = [`${number(ended)} of ${number(total)} lines`];
    if (failed) parts.push(`${number(failed)} failed`);
    if (rate) parts.push(`${number(rate)} tokens/s`);
    const complaint = batch.errors?.data[0]?.message;
    if (complaint) parts.push(complaint);
    text.textContent = parts.join(", ");
    const runs = UNFINISHED.has(batch.status);
    cancel.hidden = !runs;
    results.hidden = ended === 0;
    results.textContent = runs ? "Results so far" : "Results";
  }
  return { node, show };
}

function button(label, news, work) {
  const made = element("button", { type: "button" }, label);
  made.addEventListener("click", async () => {
    made.disabled = true;
    try {
      await work();
    } catch (failure) {
      news.textContent = failure.message;
    }
    made.disabled = false;
  });
  return made;
}

// Through fetch and not as a link, for the key's sake.
async function save(path, name) {
  const url = URL.createObjectURL(await (await call(path)).blob());
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
