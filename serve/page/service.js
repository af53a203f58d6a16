// Requests to the service: /v1/features, /v1/features/stream, /v1/models and /info.

/** An error response of the service, or the reason why it can't be reached. */
export class ServiceError extends Error {
  constructor(message, kind, status = 0) {
    super(message);
    this.kind = kind;
    this.status = status;
  }
}

let key = "";

/** Sets the API key, which later requests send as a bearer token. */
export function setKey(value) {
  key = value.trim();
}

/** Returns whether an API key is set. */
export const hasKey = () => key !== "";

async function send(path, options = {}) {
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service can't be reached: it may be down, or the connection was interrupted.", "unreachable");
  }
  if (response.ok) return response;
  const { error, error_type: kind } = await response.json().catch(() => ({}));
  const after = response.headers.get("retry-after");
  const wait = response.status === 429 && after ? ` Try again in ${after} s.` : "";
  throw new ServiceError((error ?? `The service responded with status ${response.status}.`) + wait, kind ?? `status ${response.status}`, response.status);
}

export const getModels = async () => (await (await send("v1/models")).json()).data;

export const getLimits = async () => (await (await send("info")).json()).limits ?? {};

/** Returns parameters as a query string, without the defaults of the service. */
export function query(parameters) {
  const nonDefault = Object.entries(parameters).filter(([name, value]) => value && !(name === "space" && value === "student"));
  return new URLSearchParams(nonDefault).toString();
}

/** Returns the response with the features of one audio file. */
export function getFeatures(audio, parameters, signal) {
  // The service detects the format from the content; browsers guess it from file names, sometimes wrongly.
  return send(`v1/features?${query(parameters)}`, { method: "POST", body: audio, headers: { "content-type": "application/octet-stream" }, signal });
}

/** Opens a stream. Pages can't set headers of a WebSocket, so the key is a subprotocol. */
export function openStream(parameters) {
  const url = new URL(`v1/features/stream?${query(parameters)}`, location.href);
  url.protocol = url.protocol.replace("http", "ws");
  const encoded = btoa(String.fromCharCode(...new TextEncoder().encode(key))).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  const socket = new WebSocket(url, key ? ["features", `key.${encoded}`] : "features");
  socket.binaryType = "arraybuffer";
  return socket;
}
