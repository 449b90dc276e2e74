from hypothesis import settings

# A busy machine must not fail a property: no time limit per example.
settings.register_profile("matryo", deadline=None, derandomize=True)
settings.load_profile("matryo")
