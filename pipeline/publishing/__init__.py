"""Publication of a student on the Hugging Face Hub."""
