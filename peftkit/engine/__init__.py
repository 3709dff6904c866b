"""What makes training fast: each technique switchable by name, with its slow reference in the tests."""
