// The question before a command: what will happen, and why it is asked for. Native <dialog>: the browser keeps
// the focus inside and Escape closes it. Knows nothing about how a command is sent.

import { words } from "./format.js";

const find = (id) => document.getElementById(id);
let asking = null;
let opener = null;

/** Ask for a verb of a rollout. `send(reason)` is called on yes; what it throws is shown. */
export function confirm({ verb, effect, danger, route, now, send }) {
  const dialog = find("confirm");
  asking = { danger, send };
  opener = document.activeElement;
  find("confirm-title").textContent = `${capital(words(verb))} the rollout of ${route}?`;
  find("confirm-effect").textContent = effect;
  find("confirm-now").textContent = now;
  find("confirm-label").textContent = danger ? "Reason (needed)" : "Reason";
  const reason = find("confirm-reason");
  reason.value = "";
  reason.toggleAttribute("required", danger);
  complain("");
  const yes = find("confirm-yes");
  yes.textContent = capital(words(verb));
  yes.className = danger ? "danger" : "primary";
  yes.disabled = false;
  dialog.showModal();
  reason.focus();
}

/** Whoever opened it gets the focus back; `lost()` says where it goes when that is gone. */
export function watchDialog(lost) {
  const dialog = find("confirm");
  find("confirm-cancel").addEventListener("click", () => dialog.close());
  find("confirm-form").addEventListener("submit", (event) => {
    event.preventDefault();
    submit(dialog);
  });
  dialog.addEventListener("close", () => {
    asking = null;
    if (!opener?.isConnected) lost();
  });
}

async function submit(dialog) {
  const reason = find("confirm-reason").value.trim();
  const asked = asking;
  if (!asked) return;
  if (asked.danger && !reason) {
    complain("Say why: it goes into the audit trail.");
    find("confirm-reason").focus();
    return;
  }
  complain("");
  find("confirm-yes").disabled = true;
  try {
    await asked.send(reason);
    if (asking === asked) dialog.close();
  } catch (error) {
    if (asking === asked) complain(error.message);
  } finally {
    find("confirm-yes").disabled = false;
  }
}

function complain(message) {
  find("confirm-error").textContent = message;
  find("confirm-reason").setAttribute("aria-invalid", String(message !== ""));
}

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
