// Talks to the service as any client does: /v1/features, /v1/models, /info.

/** What the service refuses, or why it can't be reached. */
export class Refused extends Error {
  constructor(message, kind, status = 0) {
    super(message);
    this.kind = kind;
    this.status = status;
  }
}

let key = "";

/** Sent as the bearer token from now on. */
export function setKey(value) {
  key = value.trim();
}

/** Whether a key was given. */
export const hasKey = () => key !== "";

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The service can't be reached: it may be down, or the connection was cut.", "unreachable");
  }
  if (answer.ok) return answer;
  const { error, error_type: kind } = await answer.json().catch(() => ({}));
  const after = answer.headers.get("retry-after");
  const wait = answer.status === 429 && after ? ` Try again in ${after} s.` : "";
  throw new Refused((error ?? `The service answered with status ${answer.status}.`) + wait, kind ?? `status ${answer.status}`, answer.status);
}

export const getModels = async () => (await (await ask("v1/models")).json()).data;

export const getLimits = async () => (await (await ask("info")).json()).limits ?? {};

/** The query of `wanted`, without what is the service's default. */
export function query(wanted) {
  const given = Object.entries(wanted).filter(([name, value]) => value && !(name === "space" && value === "student"));
  return new URLSearchParams(given).toString();
}

/** The answer to one audio file; its `.npy` is the body. */
export function getFeatures(audio, wanted, signal) {
  // Bytes say what they are; browsers' guesses from file names are sometimes wrong.
  return ask(`v1/features?${query(wanted)}`, { method: "POST", body: audio, headers: { "content-type": "application/octet-stream" }, signal });
}
