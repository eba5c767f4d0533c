"""From a knowledge graph and questions to a file of questions with their subgraphs."""
