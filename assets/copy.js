/* The buttons that copy a piece of code. */
"use strict";

document.addEventListener("click", async event => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const code = button.closest(".code-box").querySelector("code");
  let done = "Copied";
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {
    /* Without https, browsers keep the clipboard from pages: the text is selected, to be copied by keyboard. */
    getSelection().selectAllChildren(code);
    done = "Selected";
  }
  button.textContent = done;
  setTimeout(() => (button.textContent = "Copy"), 2000);
});
