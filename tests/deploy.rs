//! What `deploy/` ships: the chart, the kustomize base that is made from it, and the image. Rendered by helm and
//! kustomize themselves (`tests/peers.sh deploy` builds them); what a real API server says of it is in
//! `tests/kubernetes/policy`.

#![cfg(feature = "agent")]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

/// Documents by kind and name.
type Objects = BTreeMap<(String, String), Value>;

// --- the chart is right ---------------------------------------------------------------------------------

#[test]
fn the_kustomize_base_is_what_the_chart_says() {
    let output = Command::new("deploy/render").arg("--check").env("HELM", program("helm")).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn helm_finds_no_fault_with_the_chart() {
    let output = Command::new(program("helm")).args(["lint", "--strict", "deploy/chart"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn each_distribution_is_the_same_by_helm_and_by_kustomize() {
    for name in ["kubeadm", "k3s", "microk8s"] {
        let helm = chart(&format!("distribution: {name}"));
        let kustomize = run("kustomize", ["build", &format!("deploy/kustomize/{name}")]);
        let kustomize = objects(&kustomize);
        assert_eq!(helm.keys().collect::<Vec<_>>(), kustomize.keys().collect::<Vec<_>>());
        for (key, object) in &helm {
            assert_eq!(sorted(object), sorted(&kustomize[key]), "{name}: {key:?}");
        }
    }
}

#[test]
fn the_schema_takes_what_makes_sense_and_nothing_else() {
    let on = "services: on\nexternalIPs: off\nmasquerade: off\n";
    for good in [
        "",
        on,
        "encap: auto",
        "clusterCidr: [10.244.0.0/16, 'fd00:244::/56']",
        "underlayMtu: 1420",
        "apiServer: ['https://[fd00::1]:6443', 'https://k8s.example:6443']",
        "maxSurge: 3",
        "image: {digest: 'sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'}",
    ] {
        let output = template(good);
        assert!(output.status.success(), "{good}: {}", text(&output));
    }
    for (bad, word) in [
        ("encap: ipsec", "encap"),
        ("services: maybe", "services"),
        ("lanes: 0", "lanes"),
        ("lanes: 65", "lanes"),
        ("port: 70000", "port"),
        ("keepalive: -1", "keepalive"),
        ("clusterCidr: 10.244.0.0/16", "clusterCidr"),
        ("clusterCidr: [10.244.0.0]", "clusterCidr"),
        ("apiServer: ['http://k8s.example']", "apiServer"),
        ("apiServer: ['https://a,https://b']", "apiServer"),
        ("kubeletKubeconfig: etc/kubelet.conf", "kubeletKubeconfig"),
        ("cni: {confdir: /etc}", "confdir"),
        ("cni: {binDir: /opt/cni/bin/}", "binDir"),
        ("distribution: openshift", "distribution"),
        ("underlayMtu: 500", "underlayMtu"),
        ("maxSurge: 0", "maxSurge"),
        ("maxSurge: 0%", "maxSurge"),
        ("image: {digest: 'sha256:a'}", "digest"),
        ("encapsulation: vxlan", "encapsulation"),
    ] {
        let output = template(bad);
        assert!(!output.status.success() && text(&output).contains(word), "{bad}: {}", text(&output));
    }
}

/// A wrong name would be a setting that does nothing.
#[test]
fn every_variable_of_the_pods_is_one_that_the_agent_knows() {
    let values = "apiServer: ['https://k8s.example:6443']\nkubeletKubeconfig: /etc/kubernetes/kubelet.conf\n\
        clusterCidr: [10.244.0.0/16]\nserviceCidr: [10.96.0.0/16]\nlocation: home\nnodePortAddresses: [192.0.2.0/24]\n\
        healthzBindAddress: '[::]:10256'\n";
    let pod = pod(&chart(values));
    for container in
        pod["initContainers"].as_array().unwrap().iter().chain(pod["containers"].as_array().unwrap())
    {
        let command = container["args"][0].as_str().unwrap();
        let help = Command::new(env!("CARGO_BIN_EXE_warren")).args([command, "--help"]).output().unwrap();
        assert!(help.status.success(), "warren {command}: {}", text(&help));
        // Where a line ends says nothing.
        let help = text(&help).split_whitespace().collect::<Vec<_>>().join(" ");
        for variable in container["env"].as_array().unwrap() {
            let name = variable["name"].as_str().unwrap();
            assert!(help.contains(&format!("[env: {name}=")), "`warren {command} --help` knows no {name}");
        }
    }
}

#[test]
fn values_reach_the_agent_as_they_were_written() {
    let values = "services: off\nexternalIPs: on\nvni: 16777215\nclusterCidr: [10.244.0.0/16, 'fd00:244::/56']\n\
        extraEnv: [{name: WARREN_NO_UDP_GSO, value: 'true'}]\n";
    let environment = environment(&pod(&chart(values)));
    for (name, value) in [
        ("WARREN_SOURCE", "kube"),
        ("WARREN_SERVICES", "off"),
        ("WARREN_EXTERNAL_IPS", "on"),
        ("WARREN_VNI", "16777215"),
        ("WARREN_CLUSTER_CIDR", "10.244.0.0/16,fd00:244::/56"),
        ("WARREN_NO_UDP_GSO", "true"),
    ] {
        assert_eq!(environment.get(name).map(String::as_str), Some(value), "{name}");
    }
    assert!(!environment.contains_key("WARREN_API_SERVER"), "an empty value is none");
}

#[test]
fn without_cni_nothing_of_the_kubelets_is_mounted() {
    let pod = pod(&chart("cni: {enabled: false}"));
    assert!(pod.get("initContainers").is_none());
    assert!(!pod.to_string().contains("cni"), "{pod}");
}

// --- as little privilege as works -----------------------------------------------------------------------

#[test]
fn no_container_has_more_privilege_than_it_needs() {
    let pod = pod(&chart(""));
    assert_eq!(pod["securityContext"], json!({ "seccompProfile": { "type": "RuntimeDefault" } }));
    for key in ["hostPID", "hostIPC", "shareProcessNamespace"] {
        assert!(pod.get(key).is_none(), "{key}");
    }
    let context = |container: &Value| container["securityContext"].clone();
    let agent = &pod["containers"][0];
    assert_eq!(
        context(agent),
        json!({
            "runAsUser": 0, "privileged": false, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
            "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN"] },
        })
    );
    assert_eq!(
        context(&pod["initContainers"][0]),
        json!({
            "runAsUser": 0, "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
            "capabilities": { "add": ["DAC_OVERRIDE"], "drop": ["ALL"] },
        })
    );
    // Who writes there decides what the kubelet runs as root.
    let writes = |container: &Value| -> BTreeSet<String> {
        let mounts = container["volumeMounts"].as_array().unwrap().iter();
        let written = mounts.filter(|mount| mount["readOnly"] != json!(true));
        written.map(|mount| mount["mountPath"].as_str().unwrap().to_owned()).collect()
    };
    let expected = [
        "/var/lib/warren",
        "/run/warren",
        "/var/run/wireguard",
        "/dev/net/tun",
        "/host/proc/sys/net",
        "/etc/cni/net.d",
    ];
    assert_eq!(writes(agent), expected.map(str::to_owned).into());
    assert_eq!(writes(&pod["initContainers"][0]), ["/opt/cni/bin".to_owned()].into());
}

#[test]
fn the_rights_are_these_and_no_more() {
    let rules = |values: &str, kind: &str| -> BTreeSet<String> {
        let chart = chart(values);
        let rules = chart[&(kind.to_owned(), "warren".to_owned())]["rules"].as_array().unwrap();
        let list = |value: &Value| {
            value.as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect::<Vec<_>>().join(",")
        };
        rules.iter().map(|rule| format!("{} {}", list(&rule["resources"]), list(&rule["verbs"]))).collect()
    };
    let always = ["nodes list,watch", "nodes patch", "nodes/status patch", "servicecidrs list,watch"];
    let always = BTreeSet::from(always.map(str::to_owned));
    let mut with_services = always.clone();
    with_services.extend(["services list,watch", "endpointslices list,watch"].map(str::to_owned));
    assert_eq!(rules("", "ClusterRole"), with_services);
    assert_eq!(rules("", "Role"), ["events create".to_owned()].into());
    // Without Services only where the API servers are.
    assert_eq!(rules("services: off", "ClusterRole"), always);
    let here = ["events create", "endpointslices list,watch"];
    assert_eq!(rules("services: off", "Role"), here.map(str::to_owned).into());
}

/// In an update two pods share the node's ports: until it has taken over, a pod is asked by name.
#[test]
fn a_pod_that_stands_by_is_not_ready_by_the_word_of_another() {
    let objects = chart("");
    let agent = &pod(&objects)["containers"][0];
    let probe = &agent["startupProbe"];
    assert_eq!(probe["exec"]["command"], json!(["/warren", "status", "--ready"]));
    assert_eq!(probe["failureThreshold"], json!(i32::MAX), "nothing ends for waiting");
    let instance =
        agent["env"].as_array().unwrap().iter().find(|one| one["name"] == "WARREN_INSTANCE").unwrap();
    assert_eq!(instance["valueFrom"]["fieldRef"]["fieldPath"], "metadata.uid");
}

/// The policy is for the account that the pods have, also in another namespace.
#[test]
fn the_policy_names_the_account_of_the_pods() {
    let objects = objects(&text(&helm("elsewhere", "")));
    let policy = &objects[&("ValidatingAdmissionPolicy".to_owned(), "warren".to_owned())];
    let account = pod(&objects)["serviceAccountName"].as_str().unwrap().to_owned();
    let condition = policy["spec"]["matchConditions"][0]["expression"].as_str().unwrap();
    assert_eq!(
        condition,
        format!("request.userInfo.username == 'system:serviceaccount:elsewhere:{account}'")
    );
    assert_eq!(policy["spec"]["failurePolicy"], "Fail");
    let binding = &objects[&("ValidatingAdmissionPolicyBinding".to_owned(), "warren".to_owned())];
    assert_eq!(binding["spec"], json!({ "policyName": "warren", "validationActions": ["Deny"] }));
}

// --- the image ------------------------------------------------------------------------------------------

/// Everything in it is named by its hash, and made again it is the same.
#[test]
fn the_image_is_whole_and_made_the_same_each_time() {
    let folder = tempfile::tempdir().unwrap();
    // The header of a static program for x86-64: what matters to the script.
    let programs = [(62_u16, "amd64"), (183, "arm64")].map(|(machine, name)| {
        let file = folder.path().join(name);
        fs::write(&file, elf(machine)).unwrap();
        file
    });
    let build = |output: &Path| {
        let mut command = Command::new("deploy/build-image");
        command.args(&programs).arg("--output").arg(output).args(["--name", "registry.example/warren"]);
        let done = command.output().unwrap();
        assert!(done.status.success(), "{}", text(&done));
        fs::read(output).unwrap()
    };
    let file = folder.path().join("one.tar");
    assert_eq!(build(&file), build(&folder.path().join("two.tar")));

    let layout = folder.path().join("layout");
    unpack(&file, &layout);
    let read = |path: PathBuf| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let blob = |descriptor: &Value| {
        layout.join("blobs").join(descriptor["digest"].as_str().unwrap().replace(':', "/"))
    };
    let mut blobs = 0;
    for entry in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(OsStr::new(&sha256(&path)), path.file_name().unwrap());
        blobs += 1;
    }
    assert_eq!(blobs, 7, "an index; and a manifest, a configuration and a layer for each architecture");

    let index = read(layout.join("index.json"));
    let names: Vec<_> = index["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["annotations"]["io.containerd.image.name"])
        .collect();
    assert!(
        names[0] == &json!(format!("registry.example/warren:{}", env!("CARGO_PKG_VERSION"))),
        "{names:?}"
    );
    let platforms = read(blob(&index["manifests"][0]));
    for (manifest, (_, arch)) in
        platforms["manifests"].as_array().unwrap().iter().zip([(62, "amd64"), (183, "arm64")])
    {
        assert_eq!(manifest["platform"], json!({ "architecture": arch, "os": "linux" }));
        let manifest = read(blob(manifest));
        let config = read(blob(&manifest["config"]));
        assert_eq!(config["architecture"], arch);
        assert_eq!(config["config"]["Entrypoint"], json!(["/warren"]));
        let layer = folder.path().join(format!("layer-{arch}"));
        unpack(&blob(&manifest["layers"][0]), &layer);
        let files: BTreeSet<_> =
            fs::read_dir(&layer).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(files, ["warren".into(), "warren-cni".into()].into());
        assert_eq!(fs::read_link(layer.join("warren-cni")).unwrap(), Path::new("warren"));
    }
}

#[test]
fn a_program_that_needs_libraries_is_not_put_into_the_image() {
    let done = Command::new("deploy/build-image").arg("/proc/self/exe").output().unwrap();
    assert!(!done.status.success() && text(&done).contains("not static"), "{}", text(&done));
}

/// Symbols that were not stripped, or a library that is large.
#[test]
fn a_program_that_is_too_large_to_be_shipped_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("dist/warren");
    fs::create_dir(program.parent().unwrap()).unwrap();
    fs::write(&program, elf(62)).unwrap();
    fs::File::options().write(true).open(&program).unwrap().set_len(20_000_001).unwrap();
    let output = folder.path().join("image.tar");
    let done =
        Command::new("deploy/build-image").arg(&program).arg("--output").arg(&output).output().unwrap();
    assert!(!done.status.success() && text(&done).contains("20000001 bytes"), "{}", text(&done));
    assert!(!output.exists());
}

// --- how it is looked at ----------------------------------------------------------------------------------

fn program(name: &str) -> PathBuf {
    let peers = Command::new("tests/peers.sh").arg("--path").output().unwrap();
    let path = Path::new(String::from_utf8_lossy(&peers.stdout).trim()).join(name);
    assert!(path.exists(), "{} is missing: tests/peers.sh deploy", path.display());
    path
}

fn run<const N: usize>(name: &str, args: [&str; N]) -> String {
    let output = Command::new(program(name)).args(args).output().unwrap();
    assert!(output.status.success(), "{name} {args:?}: {}", text(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The chart in this namespace, with these values.
fn helm(namespace: &str, values: &str) -> Output {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), values).unwrap();
    let mut command = Command::new(program("helm"));
    command.args(["template", "warren", "deploy/chart", "--kube-version", "1.30", "--namespace", namespace]);
    command.arg("--values").arg(file.path()).output().unwrap()
}

fn template(values: &str) -> Output {
    helm("kube-system", values)
}

fn chart(values: &str) -> Objects {
    let output = template(values);
    assert!(output.status.success(), "{values}: {}", text(&output));
    objects(&text(&output))
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn objects(yaml: &str) -> Objects {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).unwrap();
    let name = |object: &Value| {
        (object["kind"].as_str().unwrap().to_owned(), object["metadata"]["name"].as_str().unwrap().to_owned())
    };
    documents.into_iter().filter(|object| !object.is_null()).map(|object| (name(&object), object)).collect()
}

fn pod(objects: &Objects) -> Value {
    objects[&("DaemonSet".to_owned(), "warren".to_owned())]["spec"]["template"]["spec"].clone()
}

fn environment(pod: &Value) -> BTreeMap<String, String> {
    let variables = pod["containers"][0]["env"].as_array().unwrap().iter();
    variables
        .filter_map(|v| Some((v["name"].as_str()?.to_owned(), v["value"].as_str()?.to_owned())))
        .collect()
}

/// Lists of named things in the order of their names: what order they have means nothing.
fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            Value::Object(map.iter().map(|(key, value)| (key.clone(), sorted(value))).collect())
        }
        Value::Array(items) => {
            let mut items: Vec<Value> = items.iter().map(sorted).collect();
            if items.iter().all(|item| item.get("name").is_some()) {
                items.sort_by_key(ToString::to_string);
            }
            Value::Array(items)
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
    }
}

fn unpack(file: &Path, folder: &Path) {
    fs::create_dir(folder).unwrap();
    let done = Command::new("tar").arg("-xf").arg(file).arg("-C").arg(folder).output().unwrap();
    assert!(done.status.success(), "{}", text(&done));
}

fn sha256(file: &Path) -> String {
    let done = Command::new("sha256sum").arg(file).output().unwrap();
    text(&done).split_whitespace().next().unwrap().to_owned()
}

/// An ELF header (elf(5)) of a program for that machine, without program headers.
fn elf(machine: u16) -> Vec<u8> {
    let mut header = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    header.extend(2_u16.to_le_bytes());
    header.extend(machine.to_le_bytes());
    header.extend([1, 0, 0, 0]);
    header.resize(52, 0);
    header.extend(64_u16.to_le_bytes());
    header.resize(64, 0);
    header
}
