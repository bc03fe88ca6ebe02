"""From models, and from what Dynamo hands over, to graphs."""
