#!/usr/bin/env bash
# Runs the Bazel of Debian 12 (4.2.3) on this repository's targets, without a download.
# usage: scripts/bazel-debian.sh test //tests/...
# That Bazel cannot read MODULE.bazel or fetch rules. Its native Python rules and the packages of .venv replace them.
# Needs: apt-get install bazel-bootstrap bazel-platforms bazel-rules-java; make setup; make cuda for the CUDA targets
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

REPOSITORIES=$PWD/.tools/bazel

write() { # write REPOSITORY/FILE; content from stdin
  mkdir -p "$REPOSITORIES/$(dirname "$1")"
  cat >"$REPOSITORIES/$1"
}

native() { # export native rules from REPOSITORY//PACKAGE:FILE
  local file=$1 rule
  shift
  : | write "$(dirname "$file")/BUILD"
  for rule in "$@"; do echo "$rule = native.$rule"; done | write "$file"
}

rm -rf "$REPOSITORIES"
for rule in py_library py_binary py_test; do native "rules_python/python/$rule.bzl" "$rule"; done
native rules_cc/cc/defs.bzl cc_binary cc_import cc_library cc_test cc_toolchain cc_toolchain_suite objc_library
echo 'filegroup(name = "coverage_report_generator", visibility = ["//visibility:public"])' | write remote_coverage_tools/BUILD
while IFS='=' read -r name _; do
  name=${name//[-.]/_}
  echo "py_library(name = \"$name\", visibility = [\"//visibility:public\"])" | write "pypi/$name/BUILD"
done < <(grep -v '^#' tests/requirements-bazel.txt)
headers() { # headers REPOSITORY FOLDER: the headers that `make cuda` has fetched
  write "$1/BUILD" <custom_calls/headers.BUILD
  ln -s "$PWD/.tools/cuda/headers/$2/include" "$REPOSITORIES/$1/include"
}
headers cutlass cutlass_library/source
headers xla_ffi jaxlib
for repository in "$REPOSITORIES"/*; do : | write "$(basename "$repository")/WORKSPACE"; done

cat >"$REPOSITORIES/bazelrc" <<EOF
build --override_repository=rules_python=$REPOSITORIES/rules_python
build --override_repository=rules_cc=$REPOSITORIES/rules_cc
build --override_repository=pypi=$REPOSITORIES/pypi
build --override_repository=remote_coverage_tools=$REPOSITORIES/remote_coverage_tools
build --override_repository=cutlass=$REPOSITORIES/cutlass
build --override_repository=xla_ffi=$REPOSITORIES/xla_ffi
build --override_repository=platforms=/usr/share/bazel/tools/platforms
build --override_repository=rules_java=/usr/share/bazel/rules/java
build --symlink_prefix=/
build --incompatible_use_python_toolchains=false
build --python_path=$PWD/.venv/bin/python
EOF
exec bazel --bazelrc="$REPOSITORIES/bazelrc" "$@"
