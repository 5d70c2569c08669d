"""The test suite; it mirrors the library's folders. `tests.tiny` makes the small models that most of it runs on."""
