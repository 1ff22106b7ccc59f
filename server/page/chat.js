// A conversation, streamed; it is kept nowhere but in this tab.

import { events, post } from "./api.js";
import { byId, element } from "./dom.js";

export function startChat() {
  const messages = [];
  let stop = null; // of the answer that is being written

  function begin(role, content) {
    const text = document.createTextNode(content);
    byId("chat-log").append(element("p", { className: role }, text));
    return text;
  }

  async function answer(shown) {
    const body = { messages, stream: true };
    const response = await post("/v1/chat/completions", body, { signal: stop.signal });
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      shown.data += event.choices[0]?.delta.content ?? "";
      byId("chat-log").scrollTop = byId("chat-log").scrollHeight;
    }
  }

  async function send(text) {
    messages.push({ role: "user", content: text });
    begin("user", text);
    const shown = begin("assistant", "");
    stop = new AbortController();
    busy(true);
    try {
      await answer(shown);
    } catch (failure) {
      if (failure.name !== "AbortError") begin("problem", failure.message);
    }
    if (shown.data) messages.push({ role: "assistant", content: shown.data });
    else messages.pop(); // unanswered: the next question does not repeat it
    busy(false);
  }

  function busy(isBusy) {
    byId("chat-send").disabled = byId("chat-clear").disabled = isBusy;
    byId("chat-stop").disabled = !isBusy;
  }

  byId("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (byId("chat-send").disabled) return;
    const text = byId("chat-text").value;
    byId("chat-text").value = "";
    send(text);
  });
  byId("chat-text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("chat-form").requestSubmit();
  });
  byId("chat-stop").addEventListener("click", () => stop.abort());
  byId("chat-clear").addEventListener("click", () => {
    messages.length = 0;
    byId("chat-log").replaceChildren();
  });
}
