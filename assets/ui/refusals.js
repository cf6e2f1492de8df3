// What the service refuses: Gradio shows the sentence, and the parts of the page that wait for an answer learn that none
// will come. Every request says in which language the page is.

(() => {
  const ask = window.fetch.bind(window);
  const ours = /\/gradio_api\/(queue\/join|run\/|upload)/;
  window.fetch = async (input, options = {}) => {
    if (!ours.test(String(input?.url || input))) return ask(input, options);
    const headers = new Headers(options.headers || input?.headers);
    headers.set("X-Page-Language", document.documentElement.lang || navigator.language || "en");
    const answer = await ask(input, { ...options, headers });
    if (!answer.ok) {
      const said = await answer.clone().json().catch(() => ({}));
      window.dispatchEvent(new CustomEvent("al-refused", { detail: said.error || "" }));
    }
    return answer;
  };
})();
