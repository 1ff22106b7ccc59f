// What runs now, from GET /status.

import { byId, bytes, element, number, say, seconds, showMeter } from "./dom.js";

export function showEngine(status) {
  say("model", status.models[0]);
  say("state", status.state);
  say("decode-rate", number(status.rates.decode_tokens_per_s));
  say("prefill-rate", number(status.rates.prefill_tokens_per_s));
  say("running", `${number(status.requests.running)} of ${number(status.requests.max_running)}`);
  say("waiting", number(status.requests.waiting));
  byId("no-step").hidden = status.step !== null;
  byId("step").hidden = status.step === null;
  if (status.step !== null) showStep(status.step);
  const hasDevice = status.memory.some((tier) => tier.tier === "device");
  if (status.step !== null) say("copy-text", hasDevice ? copied(status) : inPlace(status));
  showMemory(status.memory, status.kv);
}

function showStep(step) {
  const { wall_s, compute_s, stall_s } = step;
  const tokens = `${number(step.decode_tokens)} output and ${number(step.prefill_tokens)} prompt tokens`;
  say("step-text", `${tokens} in ${seconds(wall_s)}`);
  showMeter("compute", compute_s / wall_s, seconds(compute_s));
  showMeter("stall", stall_s / wall_s, seconds(stall_s));
  byId("sub-batches").replaceChildren(...step.sub_batches.map(subBatchLine));
}

function copied({ step, rates }) {
  const rate = `${bytes(rates.down_bytes_per_s)}/s down, ${bytes(rates.up_bytes_per_s)}/s up`;
  return `${bytes(step.down_bytes)} down, ${bytes(step.up_bytes)} up, beside the computing; lately ${rate}`;
}

function inPlace({ step }) {
  return `none: ${bytes(step.down_bytes)} read and ${bytes(step.up_bytes)} written in place`;
}

function subBatchLine(fill, index) {
  const meter = element("meter", { value: fill.rows / fill.max_rows });
  meter.setAttribute("aria-label", `share of sub-batch ${index + 1} that is filled`);
  const text = `${fill.rows} of ${fill.max_rows} rows, ${number(fill.tokens)} tokens`;
  return element("li", {}, element("span", {}, String(index + 1)), meter, element("span", {}, text));
}

function showMemory(tiers, kv) {
  const share = kv.total_bytes ? kv.used_bytes / kv.total_bytes : 0;
  showMeter("kv", share, `${bytes(kv.used_bytes)} of ${bytes(kv.total_bytes)}`);
  byId("tiers").replaceChildren(...tiers.flatMap(tierTable));
}

function tierTable(tier) {
  const budget = tier.budget_bytes;
  const ceiling = budget === null ? "" : ` of ${bytes(budget)}`;
  const caption = `${tier.tier}: ${bytes(tier.planned_bytes)}${ceiling}`;
  const rows = tier.parts.map((part) =>
    element("tr", {}, element("td", {}, part.name), element("td", {}, bytes(part.bytes))),
  );
  const table = element("table", {}, element("caption", {}, caption), element("tbody", {}, ...rows));
  if (budget === null) return [table];
  const meter = element("meter", { value: budget ? tier.planned_bytes / budget : 0 });
  meter.setAttribute("aria-label", `share of ${tier.tier} memory that is planned for`);
  return [table, meter];
}
