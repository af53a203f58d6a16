// A proxy may show the service under a path of another site, so addresses are relative to this page.
fetch("openapi.json").then((answer) => answer.json()).then((schema) => SwaggerUIBundle({
  spec: { ...schema, servers: [{ url: new URL(".", location.href).pathname }] },
  dom_id: "#reference",
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
}));
