"""Models: text encoder, graph retriever, fact sampler, projector, neural prompt and generator."""
