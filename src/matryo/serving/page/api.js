// The server's own API. The key lives in this variable and nowhere else.
let key = "";
export const useKey = (text) => (key = text.trim());

export class Refused extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const pause = (seconds, signal) =>
  new Promise((done, failed) => {
    setTimeout(done, 1000 * seconds);
    signal?.addEventListener("abort", () => failed(signal.reason), { once: true });
  });

async function ask(path, options = {}, tries = 3) {
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...options.headers };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer.", "unreachable");
  }
  const after = Number(answer.headers.get("retry-after"));
  if ((answer.status === 429 || answer.status === 503) && after > 0 && after <= 5 && tries > 1) {
    await pause(after, options.signal);
    return ask(path, options, tries - 1);
  }
  const content = await answer.json();
  if (!answer.ok) {
    const { message, code } = content.error;
    throw new Refused(answer.status, message, code);
  }
  const timing = Object.fromEntries(
    (answer.headers.get("server-timing") ?? "").split(",").map((part) => {
      const [name, value] = part.trim().split(";dur=");
      return [name, Number(value)];
    }),
  );
  return { content, timing };
}

export const get = async (path) => (await ask(path)).content;
export const post = (path, body, signal) =>
  ask(path, { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal });

// Full-width unit vectors of texts, as the base64 they came in and as numbers.
export async function encode(model, texts, more, signal) {
  const asked = { model, input: texts, encoding_format: "base64", truncate: "end", ...more };
  const { content, timing } = await post("/v1/embeddings", asked, signal);
  const vectors = content.data.map(({ embedding }) => ({ coded: embedding, numbers: floats(embedding) }));
  return { vectors, timing };
}

function floats(coded) {
  const raw = Uint8Array.from(atob(coded), (letter) => letter.charCodeAt(0));
  const view = new DataView(raw.buffer);
  return Float32Array.from({ length: raw.length / 4 }, (_, n) => view.getFloat32(4 * n, true));
}
