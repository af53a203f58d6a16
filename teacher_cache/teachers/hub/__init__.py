"""Teachers that are named by their repository on the Hugging Face Hub. They are fetched by the library ``huggingface_hub``."""
