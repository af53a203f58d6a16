SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#reference",
  validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis],
});
