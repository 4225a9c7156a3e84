"""What a model and its training are made of: one file per kind, one class per variant.

Importing this package registers nothing and costs nothing; `registry.load_builtin()` imports the
files below it when somebody first asks for a component.
"""
