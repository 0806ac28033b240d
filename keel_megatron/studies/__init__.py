"""The paper's studies, one command each."""
