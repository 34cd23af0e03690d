// Sends a form without leaving the page, so the chosen video stays chosen. Without scripts the page works too.
"use strict";

const limit = Number(document.body.dataset.uploadBytes);

function say(words, kind) {
  const line = document.createElement("p");
  line.className = kind;
  line.textContent = words;
  document.getElementById("answer").replaceChildren(line);
}

async function send(event) {
  event.preventDefault();
  const form = event.target;
  const video = form.elements.video?.files[0];
  if (video && video.size > limit) {
    say(`The video is larger than ${document.body.dataset.limit}; choose a smaller one.`, "error");
    return;
  }
  const body = new FormData(form, event.submitter);
  const buttons = document.querySelectorAll("button");
  buttons.forEach((button) => (button.disabled = true));
  say("Working …", "working");
  try {
    const reply = await fetch("/", { method: "POST", body });
    const page = new DOMParser().parseFromString(await reply.text(), "text/html");
    document.getElementById("answer").replaceWith(page.getElementById("answer"));
  } catch {
    say("No answer came. Does the program still run, and can the file still be read?", "error");
  } finally {
    buttons.forEach((button) => (button.disabled = false));
  }
}

for (const form of document.forms) form.addEventListener("submit", send);
