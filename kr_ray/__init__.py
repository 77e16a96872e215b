"""Knowledge Recycling on Ray: synthetic training sets from private images, and an audit of what leaks."""
